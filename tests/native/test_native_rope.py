"""The C++ rope, op by op: the 2x rule against fp64, positions, layouts, empty input, poison, repeatability, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS = 30
PLACES = ("none", "given", "documents")


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(half: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def places(kind: str, batch: int, length: int, seed: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """positions and cu_seqlens as the op takes them, and the positions that they mean, found token by token."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "given":
        positions = torch.randint(0, ROWS, (batch, length), generator=generator)
        return positions, None, positions
    if kind == "none":
        return None, None, torch.arange(length).expand(batch, length)
    tokens = batch * length
    inner = torch.randint(0, tokens + 1, (4,), generator=generator).tolist()  # empty documents too
    bounds = sorted([0, *inner, tokens])
    meant = []
    for token in range(tokens):
        begins = token % length == 0 or token in bounds
        meant.append(0 if begins else meant[-1] + 1)
    return None, torch.tensor(bounds, dtype=torch.int32), torch.tensor(meant).view(batch, length)


def own(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate-half in the dtype of x, as Hugging Face's Llama; interleaved pairs are moved apart and back."""
    if interleaved:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    cos2, sin2 = (torch.cat((t, t), -1).to(x.dtype)[positions].unsqueeze(2) for t in (cos, sin))
    half = x.shape[-1] // 2
    y = x * cos2 + torch.cat((-x[..., half:], x[..., :half]), -1) * sin2
    return torch.stack(y.chunk(2, -1), -1).flatten(-2) if interleaved else y


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.integers(1, 4),
    key_heads=st.integers(0, 2),
    half=st.integers(1, 70) | st.sampled_from([128]),
    kind=st.sampled_from(PLACES),
    interleaved=st.booleans(),
    inverse=st.booleans(),
)
def test_obeys_the_rule(
    ops: Any,
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int,
    key_heads: int,
    half: int,
    kind: str,
    interleaved: bool,
    inverse: bool,
) -> None:
    cos, sin = tables(half)
    positions, cu_seqlens, meant = places(kind, batch, length, half)
    q, k, v = (drawn(i, batch, length, n, 2 * half, dtype=dtype) for i, n in enumerate((heads, key_heads, key_heads)))
    where = (cos, sin, positions, cu_seqlens, interleaved)
    rotated = ops.rope(q, k, *where, inverse)
    for got, x in zip(rotated, (q, k), strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        turn = (cos, -sin if inverse else sin, meant, interleaved)
        close(got, own(x, *turn), own(x.double(), *turn))
    # The other forms give the same bits.
    qkv = torch.cat((q, k, v), 2)
    if inverse:
        assert torch.equal(ops.rope_qkv_backward(q, k, v, *where), torch.cat((*rotated, v), 2))
    else:
        ops.rope_(qkv, heads + key_heads, *where)
        assert torch.equal(qkv, torch.cat((*rotated, v), 2))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_same_bits(ops: Any, dtype: torch.dtype, interleaved: bool) -> None:
    batch, length, heads, head_dim = 2, 5, 3, 22
    where = (*tables(11), None, None, interleaved)
    q, k, v = (drawn(i, batch, length, n, head_dim, dtype=dtype) for i, n in enumerate((heads, 1, 1)))
    expected = ops.rope(q, k, *where, False)
    gradient = ops.rope_qkv_backward(q, k, v, *where)

    def by_head(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def far_apart(t: Tensor) -> Tensor:
        return torch.full((*t.shape, 2), torch.nan, dtype=dtype)[..., 0].copy_(t)

    for layout in (by_head, far_apart):
        assert same(ops.rope(layout(q), layout(k), *where, False), expected)
        assert torch.equal(ops.rope_qkv_backward(layout(q), layout(k), layout(v), *where), gradient)
    # One head that stands for all; tables and positions that are views.
    one = q[:, :, :1].expand(q.shape)
    wide_tables = tuple(torch.stack((t, t), -1)[..., 0] for t in where[:2])
    at = torch.arange(length).expand(batch, length)
    assert same(ops.rope(one, k, *wide_tables, at, None, interleaved, False), ops.rope(one.clone(), k, *where, False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_touches_only_its_heads(ops: Any, dtype: torch.dtype) -> None:
    where = (*tables(7), None, None, False)
    home = torch.full((2, 5, 6, 20), 7.0, dtype=dtype)
    qkv = home[:, :, :4, 3:17].copy_(drawn(0, 2, 5, 4, 14, dtype=dtype))
    before = qkv.clone()
    ops.rope_(qkv, 3, *where)
    assert torch.equal(qkv[:, :, :3], ops.rope(before[:, :, :3], before[:, :, 3:], *where, False)[0])
    assert torch.equal(qkv[:, :, 3:], before[:, :, 3:])
    assert home[:, :, 4:].eq(7).all() and home[..., :3].eq(7).all() and home[..., 17:].eq(7).all()


def test_turning_back_gives_what_was_there(ops: Any) -> None:
    q, k = drawn(0, 2, 8, 3, 16, dtype=torch.float64), drawn(1, 2, 8, 1, 16, dtype=torch.float64)
    for interleaved in (False, True):
        where = (*tables(8), None, None, interleaved)
        back = ops.rope(*ops.rope(q, k, *where, False), *where, True)
        torch.testing.assert_close(back, (q, k), rtol=0, atol=1e-6)  # the fp32 tables: cos^2 + sin^2 is 1 to an ulp


def test_offsets_beyond_31_bits(ops: Any, far: Callable[[Tensor], Tensor]) -> None:
    """Of rows, and in the second case of the tokens of one row."""
    q = drawn(0, 3, 2, 2, 8, dtype=torch.bfloat16)
    for near, apart in ((q, far(q)), (q[:, 0][None], far(q[:, 0])[None])):
        where = (*tables(4), None, None, False)
        expected = ops.rope(near, near, *where, False)
        assert same(ops.rope(apart, apart, *where, False), expected)
        assert torch.equal(
            ops.rope_qkv_backward(apart, apart, apart, *where)[:, :, :2], ops.rope(near, near, *where, True)[0]
        )
        ops.rope_(apart, 2, *where)
        assert torch.equal(apart, expected[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise_for_any_number_of_threads(ops: Any, threads: int) -> None:
    q, k = drawn(0, 2, 300, 6, 64, dtype=torch.float32), drawn(1, 2, 300, 2, 64, dtype=torch.float32)
    where = (*tables(32, 300), None, None, False)
    expected = [*ops.rope(q, k, *where, False), ops.rope_qkv_backward(q, k, k, *where)]
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert same([*ops.rope(q, k, *where, False), ops.rope_qkv_backward(q, k, k, *where)], expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)])
def test_empty(ops: Any, shape: tuple[int, ...]) -> None:
    x, documents = torch.empty(shape), torch.tensor([0, shape[0] * shape[1]], dtype=torch.int32)
    for cu_seqlens in (None, documents):
        where = (*tables(4), None, cu_seqlens, False)
        q, k = ops.rope(x, x, *where, False)
        ops.rope_(x, shape[2], *where)
        assert q.shape == k.shape == shape
        assert ops.rope_qkv_backward(x, x, x, *where).shape == (*shape[:2], 3 * shape[2], 8)


@pytest.mark.parametrize("position", [-1, 30, 2**40])
def test_a_position_outside_the_tables_changes_nothing(ops: Any, position: int) -> None:
    qkv, positions = torch.ones(2, 3, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    positions[1, 2] = position
    where = (*tables(4), positions, None, False)
    for call in (lambda: ops.rope(qkv, qkv, *where, False), lambda: ops.rope_(qkv, 2, *where)):
        with pytest.raises(ValueError, match=rf"position {position} at \[1, 2\] lies outside \[0, 30\)"):
            call()
    assert qkv.eq(1).all()


def test_errors_have_numbers(ops: Any) -> None:
    cos, sin = tables(4, 6)
    q = torch.zeros(2, 4, 3, 8)

    def documents(*bounds: int) -> Tensor:
        return torch.tensor(bounds, dtype=torch.int32)

    def rope(q: Tensor, k: Tensor, **given: Any) -> None:
        settings = {"cos": cos, "sin": sin, "positions": None, "cu_seqlens": None, "interleaved": False}
        ops.rope(q, k, **{**settings, **given}, inverse=False)

    positions = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="9 positions are asked for, the tables hold 6"):
        rope(torch.zeros(1, 9, 1, 8), torch.zeros(1, 9, 1, 8))
    with pytest.raises(ValueError, match=r"k is .*\[2, 5, 3, 8\] beside .*\[2, 4, 3, 8\]; they differ only in heads"):
        rope(q, torch.zeros(2, 5, 3, 8))
    with pytest.raises(ValueError, match="they differ only in heads"):
        rope(q, q.bfloat16())
    with pytest.raises(ValueError, match=r"\[6, 4\].* with head_dim 10"):
        rope(torch.zeros(2, 4, 3, 10), torch.zeros(2, 4, 3, 10))
    with pytest.raises(ValueError, match="both given"):
        rope(q, q, positions=positions, cu_seqlens=documents(0, 8))
    with pytest.raises(ValueError, match=r"positions are \[2, 3\]; one for each token \[2, 4\]"):
        rope(q, q, positions=positions[:, :3])
    with pytest.raises(TypeError, match="positions are Int, not int64"):
        rope(q, q, positions=positions.int())
    with pytest.raises(TypeError, match="cu_seqlens are Long, not int32"):
        rope(q, q, cu_seqlens=documents(0, 8).long())
    for bounds in ((0, 7), (1, 8), (0, 5, 4, 8)):
        with pytest.raises(ValueError, match=r"must rise from 0 to B\*S = 8"):
            rope(q, q, cu_seqlens=documents(*bounds))
    with pytest.raises(ValueError, match=r"cu_seqlens is \[1\]"):
        rope(q, q, cu_seqlens=documents(0))
    with pytest.raises(ValueError, match="longest document has 8 positions, the tables hold 6"):
        rope(q.view(1, 8, 3, 8), q.view(1, 8, 3, 8), cu_seqlens=documents(0, 8))
    with pytest.raises(TypeError, match="supported are fp32, bf16, fp16, fp64"):
        rope(q.int(), q.int())
    with pytest.raises(ValueError, match="4 heads are to be rotated of 3"):
        ops.rope_(q, 4, cos, sin, None, None, False)
    with pytest.raises(ValueError, match="must be neighbours"):
        ops.rope_(q.transpose(2, 3).contiguous().transpose(2, 3), 3, cos, sin, None, None, False)
    with pytest.raises(ValueError, match="must not overlap"):
        ops.rope_(q[:, :, :1].expand(2, 4, 3, 8), 3, cos, sin, None, None, False)
    assert not q.any()
