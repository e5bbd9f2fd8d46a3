"""The CUDA rope under emulation: the 2x rule against fp64, the CPU's bits, layouts, positions, any order of warps."""

from collections.abc import Callable

import emulated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor

from megapre.kernels import rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 30
PLACES = ("none", "given", "documents")
# Half a head: in vectors of 16 bytes where it is a multiple of 8 (4 in fp32), by elements else.
HALVES = st.sampled_from([1, 3, 4, 8, 12, 16, 20, 33, 64])


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
    meant: list[int] = []
    for token in range(tokens):
        begins = token % length == 0 or token in bounds
        meant.append(0 if begins else meant[-1] + 1)
    return None, torch.tensor(bounds, dtype=torch.int32), torch.tensor(meant).view(batch, length)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.integers(1, 5),
    key_heads=st.integers(0, 2),
    half=HALVES,
    kind=st.sampled_from(PLACES),
    interleaved=st.booleans(),
    inverse=st.booleans(),
)
def test_rope_obeys_the_rule(
    loaded_emulator: emulated.Emulator,
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
    ops, guarded = loaded_emulator.ops, loaded_emulator.guarded
    cos, sin = (guarded(t) for t in tables(half))
    *given_places, meant = places(kind, batch, length, half)
    positions, cu_seqlens = (None if t is None else guarded(t) for t in given_places)
    q, k, v = (drawn(i, batch, length, n, 2 * half, dtype=dtype) for i, n in enumerate((heads, key_heads, key_heads)))
    where = (cos, sin, positions, cu_seqlens, interleaved)
    rotated = ops.rope(guarded(q), guarded(k), *where, inverse)
    wide = rope.reference(q.double(), k.double(), cos, -sin if inverse else sin, meant, interleaved)
    narrow = (cos.to(dtype), (-sin if inverse else sin).to(dtype), meant, interleaved)
    for got, own, exact in zip(rotated, rope.reference(q, k, *narrow), wide, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        close(got, own, exact)
    # The same sums in the same order as on the CPU, and in the op's other forms.
    assert same(rotated, torch.ops.megapre.rope(q, k, *where, inverse))
    joined = torch.cat((*rotated, v), 2)
    if inverse:
        assert torch.equal(ops.rope_qkv_backward(guarded(q), guarded(k), guarded(v), *where), joined)
    else:
        qkv = guarded(torch.cat((q, k, v), 2))
        ops.rope_(qkv, heads + key_heads, *where)
        assert torch.equal(qkv, joined)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [8, 11])
def test_any_layout_gives_the_same_bits(
    emulator: emulated.Emulator, dtype: torch.dtype, interleaved: bool, half: int
) -> None:
    ops, batch, length = emulator.ops, 2, 5
    where = (*tables(half), None, None, interleaved)
    q, k, v = (drawn(i, batch, length, n, 2 * half, dtype=dtype) for i, n in enumerate((3, 1, 1)))
    expected, gradient = ops.rope(q, k, *where, False), ops.rope_qkv_backward(q, k, v, *where)

    def by_head(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def far_apart(t: Tensor) -> Tensor:
        return torch.full((*t.shape, 2), torch.nan, dtype=dtype)[..., 0].copy_(t)

    def off_by_one(t: Tensor) -> Tensor:
        return torch.full((t.numel() + 1,), torch.nan, dtype=dtype)[1:].view(t.shape).copy_(t)

    for layout in (by_head, far_apart, off_by_one):
        assert same(ops.rope(layout(q), layout(k), *where, False), expected)
        assert torch.equal(ops.rope_qkv_backward(layout(q), layout(k), layout(v), *where), gradient)
    qkv = torch.cat((q, k, v), 2)
    for layout in (by_head, off_by_one):
        turned = layout(qkv)
        ops.rope_(turned, 4, *where)
        assert same([turned[:, :, :3], turned[:, :, 3:4], turned[:, :, 4:]], [*expected, v])
    # One head that stands for all; tables that are views.
    one = q[:, :, :1].expand(q.shape)
    cos = torch.full((where[0].numel() + 1,), torch.nan)[1:].view(where[0].shape).copy_(where[0])
    sin = torch.stack((where[1], where[1]), -1)[..., 0]
    assert same(ops.rope(one, k, cos, sin, *where[2:], False), ops.rope(one.clone(), k, *where, False))


def test_a_part_that_is_only_moved_keeps_its_bits(emulator: emulated.Emulator) -> None:
    q, k = (drawn(i, 1, 3, 2, 16, dtype=torch.float32) for i in range(2))
    v = torch.tensor([torch.inf, -0.0, torch.nan, 1.0]).repeat(1, 3, 1, 4)
    got = emulator.ops.rope_qkv_backward(q, k, v, *tables(8), None, None, False)[:, :, 4:]
    assert torch.equal(got.view(torch.int32), v.view(torch.int32))


def test_many_heads_and_few(emulator: emulated.Emulator) -> None:
    """More threads a token than a block has; and blocks of many tokens, the last with fewer."""
    for heads, half, length in ((150, 64, 2), (1, 8, 333)):
        q, k = (drawn(i, 1, length, heads, 2 * half, dtype=torch.bfloat16) for i in range(2))
        where = (*tables(half, length), None, None, False, False)
        expected = torch.ops.megapre.rope(q, k[:, :, :1], *where)
        assert same(emulator.ops.rope(emulator.guarded(q), emulator.guarded(k[:, :, :1]), *where), expected)


def test_any_order_of_warps_gives_the_same_rotation(emulator: emulated.Emulator) -> None:
    q, k, v = (drawn(i, 2, 9, n, 64, dtype=torch.bfloat16) for i, n in enumerate((5, 2, 2)))
    where = (*tables(32), None, torch.tensor([0, 3, 18], dtype=torch.int32), True)
    expected = emulator.ops.rope_qkv_backward(q, k, v, *where)
    for seed in range(1, 5):
        emulator.schedule(seed)
        assert torch.equal(emulator.ops.rope_qkv_backward(q, k, v, *where), expected)
        qkv = torch.cat((q, k, v), 2)
        emulator.ops.rope_(qkv, 7, *where)
        assert same([qkv[:, :, :5], qkv[:, :, 5:7]], emulator.ops.rope(q, k, *where, False))


def test_a_position_outside_the_tables_is_not_read(emulator: emulated.Emulator) -> None:
    q, k = (drawn(i, 1, 4, 2, 16, dtype=torch.float32) for i in range(2))
    cos, sin = (emulator.guarded(t) for t in tables(8, 3))
    q_out, k_out = emulator.ops.rope(q, k, cos, sin, torch.tensor([[2, -1, 3, 2**40]]), None, False, False)
    for got in (q_out, k_out):
        assert got[:, 0].isfinite().all() and got[:, 1:].isnan().all()
    for bounds in ([0, 4], [9, 10], [5, 1, 0]):  # too long a document; no token's; not in order
        turned, _ = emulator.ops.rope(q, k, cos, sin, None, torch.tensor(bounds, dtype=torch.int32), False, False)
        assert turned[:, 3].isnan().all() == (bounds != [5, 1, 0])


def test_a_write_in_place_raises_the_version(emulator: emulated.Emulator) -> None:
    qkv = torch.randn(1, 3, 3, 8)
    before = qkv._version
    emulator.ops.rope_(qkv, 2, *tables(4), None, None, False)
    assert qkv._version > before


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)])
def test_empty_heads(emulator: emulated.Emulator, shape: tuple[int, ...]) -> None:
    q, where = torch.empty(shape), (*tables(shape[-1] // 2), None, None, False)
    assert all(t.shape == shape for t in emulator.ops.rope(q, q, *where, False))
    assert emulator.ops.rope_qkv_backward(q, q, q, *where).shape == (*shape[:2], 3 * shape[2], shape[3])
    emulator.ops.rope_(q, shape[2], *where)


def test_what_cannot_be_rotated_is_said(emulator: emulated.Emulator) -> None:
    ops, q, (cos, sin) = emulator.ops, torch.randn(1, 4, 2, 8), tables(4, 4)
    with pytest.raises(ValueError, match=r"q is Float \[4, 2, 8\]; \[batch, sequence, heads, head_dim\] is needed"):
        ops.rope(q[0], q[0], cos, sin, None, None, False, False)
    with pytest.raises(ValueError, match="they differ only in heads"):
        ops.rope(q, q[:, :3], cos, sin, None, None, False, False)
    with pytest.raises(ValueError, match="with head_dim 8"):
        ops.rope(q, q, cos[:, :3], sin[:, :3], None, None, False, False)
    with pytest.raises(ValueError, match="4 positions are asked for, the tables hold 3"):
        ops.rope(q, q, cos[:3], sin[:3], None, None, False, False)
    with pytest.raises(ValueError, match=r"positions are Int \[1, 4\]; one int64 for each token \[1, 4\]"):
        ops.rope(q, q, cos, sin, torch.zeros(1, 4, dtype=torch.int32), None, False, False)
    with pytest.raises(ValueError, match="both given"):
        bounds = torch.tensor([0, 4], dtype=torch.int32)
        ops.rope(q, q, cos, sin, torch.zeros(1, 4, dtype=torch.int64), bounds, False, False)
    with pytest.raises(ValueError, match=r"cu_seqlens is Long \[2\]; \[documents \+ 1\] int32"):
        ops.rope(q, q, cos, sin, None, torch.tensor([0, 4]), False, False)
    with pytest.raises(ValueError, match="3 heads are to be rotated of 2"):
        ops.rope_(q, 3, cos, sin, None, None, False)
    with pytest.raises(ValueError, match="rows must not overlap"):
        ops.rope_(q[:, :, :1].expand(1, 4, 2, 8), 2, cos, sin, None, None, False)
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take fp32, bf16 and fp16"):
        ops.rope(q.double(), q.double(), cos, sin, None, None, False, False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_beyond_31_bits(emulator: emulated.Emulator, far: Callable[[Tensor], Tensor], interleaved: bool) -> None:
    q, k = (drawn(i, 3, 4, 2, 16, dtype=torch.bfloat16) for i in range(2))
    where = (*tables(8), None, None, interleaved)
    expected = emulator.ops.rope(q, k, *where, False)
    assert same(emulator.ops.rope(far(q), far(k), *where, False), expected)
    turned = far(q)
    emulator.ops.rope_(turned, 2, *where)
    assert torch.equal(turned, expected[0])
