"""Rotary embedding: against rotate-half in the same dtype by the 2x rule, and against what a rotation must do."""

import pytest
import rotated
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import run, same, twice, widest
from torch import Tensor

from megapre import kernels
from megapre.kernels import rope

OP = "rope"


def tables(positions: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    cos, sin = rotated.tables(head_dim // 2, positions)
    return cos.to(device), sin.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    batch=st.integers(0, 3),
    seq_length=st.integers(1, 9),
    heads=st.integers(1, 4),
    key_heads=st.integers(1, 2),
    pairs=st.integers(1, 33),
    explicit=st.booleans(),
    interleaved=st.booleans(),
)
def test_rope_obeys_the_rule(
    device: str,
    implementation: str,
    dtype: torch.dtype,
    batch: int,
    seq_length: int,
    heads: int,
    key_heads: int,
    pairs: int,
    explicit: bool,
    interleaved: bool,
) -> None:
    op = kernels.choose(device, {OP: implementation}).rope
    generator = torch.Generator().manual_seed(seq_length * 100 + pairs)
    cos, sin = tables(50, 2 * pairs, device)
    q = torch.randn(batch, seq_length, heads, 2 * pairs, generator=generator).to(device, dtype)
    k = torch.randn(batch, seq_length, key_heads, 2 * pairs, generator=generator).to(device, dtype)
    positions = torch.arange(seq_length).expand(batch, -1).to(device)
    if explicit:
        positions = torch.randint(0, 50, (batch, seq_length), generator=generator).to(device)

    def own(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        at = (cos, sin, positions, interleaved)
        return rotated.own(q, *at), rotated.own(k, *at)

    twice(lambda q, k: op(q, k, cos, sin, positions if explicit else None, interleaved), own, [q, k])


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_of_rotated_vectors_depend_on_distance_only(
    device: str, implementation: str, interleaved: bool
) -> None:
    op = kernels.choose(device, {OP: implementation}).rope
    cos, sin = tables(64, 16, device)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=widest(implementation), device=device).expand(2, 1, 40, 1, 16)
    at = torch.arange(40, device=device)[None]
    near_q, near_k = op(q, k, cos, sin, at, interleaved)
    far_q, far_k = op(q, k, cos, sin, at + 20, interleaved)
    # The fp32 tables are off by an ulp, hence 1e-5 although everything else is fp64.
    torch.testing.assert_close(
        near_q[0, :, 0] @ near_k[0, :, 0].T, far_q[0, :, 0] @ far_k[0, :, 0].T, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(near_q.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(near_q[:, 0], q[:, 0])


def test_rope_of_strided_input(device: str, implementation: str) -> None:
    op = kernels.choose(device, {OP: implementation}).rope
    cos, sin = tables(8, 12, device)
    qkv = torch.randn(2, 8, 5, 12, device=device)
    q, k = qkv[:, :, :3], qkv[:, :, 3:4]
    strided = run(lambda q, k: op(q, k, cos, sin), [q, k])
    packed = run(lambda q, k: op(q, k, cos, sin), [q.contiguous(), k.contiguous()])
    assert same(strided[0] + strided[1], packed[0] + packed[1])


def test_impossible_requests_are_named(device: str, implementation: str) -> None:
    op = kernels.choose(device, {OP: implementation}).rope
    cos, sin = tables(4, 8, device)
    q = torch.zeros(1, 4, 2, 8, device=device)
    with pytest.raises(ValueError, match="5 positions are asked for, the tables hold 4"):
        op(torch.zeros(1, 5, 2, 8, device=device), torch.zeros(1, 5, 2, 8, device=device), cos, sin)
    with pytest.raises(ValueError, match="head_dim 10"):
        op(torch.zeros(1, 4, 2, 10, device=device), torch.zeros(1, 4, 2, 10, device=device), cos, sin)
    with pytest.raises(ValueError, match="they differ only in heads"):
        op(q, torch.zeros(2, 4, 2, 8, device=device), cos, sin)


def test_documents_count_from_their_own_beginning(device: str, implementation: str) -> None:
    """And so does what a row of the batch cuts off: as if every piece were rotated alone."""
    op = kernels.choose(device, {OP: implementation}).rope
    cos, sin = tables(8, 12, device)
    q, k = torch.randn(2, 6, 3, 12, device=device), torch.randn(2, 6, 1, 12, device=device)
    documents = torch.tensor([0, 2, 2, 9, 12], dtype=torch.int32, device=device)
    got = run(lambda q, k: op(q, k, cos, sin, cu_seqlens=documents), [q, k])

    def apart(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        pieces = [t.flatten(0, 1)[None].split([2, 4, 3, 3], dim=1) for t in (q, k)]
        rotated = [op(a, b, cos, sin) for a, b in zip(*pieces, strict=True)]
        q, k = (torch.cat(parts, 1).view(2, 6, -1, 12) for parts in zip(*rotated, strict=True))
        return q, k

    alone = run(apart, [q, k])
    assert same(got[0] + got[1], alone[0] + alone[1])
    with pytest.raises(ValueError, match="both given"):
        op(q, k, cos, sin, torch.zeros(2, 6, dtype=torch.int64, device=device), cu_seqlens=documents)


@pytest.mark.op("rope_")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    batch=st.integers(1, 2),
    seq_length=st.integers(1, 6),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 2),
    pairs=st.integers(1, 33),
    kind=st.sampled_from(["none", "positions", "documents"]),
    interleaved=st.booleans(),
)
def test_in_place_is_the_same_rotation(
    device: str,
    implementation: str,
    dtype: torch.dtype,
    batch: int,
    seq_length: int,
    heads: int,
    kv_heads: int,
    pairs: int,
    kind: str,
    interleaved: bool,
) -> None:
    """The joined heads of a projection: q, k, v and the gradient of the projection's input."""
    op = kernels.choose(device, {"rope_": implementation}).rope_
    width = (heads + 2 * kv_heads) * 2 * pairs
    generator = torch.Generator().manual_seed(width)
    x, weight = (torch.randn(s, generator=generator).to(device, dtype) for s in ((batch, seq_length, 3), (width, 3)))
    cos, sin = tables(20, 2 * pairs, device)
    given: dict[str, Tensor] = {}
    if kind == "positions":
        given["positions"] = torch.randint(0, 20, (batch, seq_length), generator=generator).to(device)
    elif kind == "documents":
        tokens = batch * seq_length
        given["cu_seqlens"] = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=device)

    def turned(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (-1, 2 * pairs))
        result: tuple[Tensor, Tensor, Tensor] = op(qkv, heads, kv_heads, cos, sin, **given, interleaved=interleaved)
        return result

    def apart(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (-1, 2 * pairs))
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        return *rope.reference(q, k, cos, sin, interleaved=interleaved, **given), v

    twice(turned, apart, [x, weight])
    with torch.no_grad():  # the way of generation
        q, k, v = turned(x, weight)
        for got, expected in zip((q, k, v), apart(x, weight), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.op("rope_")
def test_what_was_saved_before_a_rotation_in_place_is_missed(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"rope_": implementation}).rope_
    cos, sin = tables(4, 8, device)
    qkv = torch.randn(1, 4, 3, 8, device=device, requires_grad=True)
    saved = qkv.exp()  # its backward needs its result
    q, _, _ = op(saved, 1, 1, cos, sin)
    if implementation == "reference":
        q.sum().backward()
        return
    assert q.data_ptr() == saved.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()
    with pytest.raises(ValueError, match="a leaf that requires a gradient"):
        op(qkv, 1, 1, cos, sin)
    with pytest.raises(ValueError, match="4, D] is needed for 2 query heads"):
        op(saved, 2, 1, cos, sin)


def test_a_position_outside_the_tables_is_named() -> None:
    cos, sin = tables(4, 8, "cpu")
    q = torch.zeros(1, 2, 1, 8)
    for row in kernels.table("cpu"):
        if row.op == OP and row.available and not row.takes and row.implementation != "triton":  # which gives NaN
            op = kernels.choose("cpu", {OP: row.implementation}).rope
            for position in (-1, 4):
                with pytest.raises(ValueError, match=rf"position {position} at \[0, 1\] lies outside \[0, 4\)"):
                    op(q, q, cos, sin, torch.tensor([[0, position]]))
