"""The native forms of rope: the 2x rule against fp64, positions, layouts, heads far apart, empty heads."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_forms import Form
from rotated import PLACES, drawn, own, places, tables
from rule import close, same
from torch import Tensor

DTYPES = {
    "cpu": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "cuda": [torch.float32, torch.bfloat16, torch.float16],
}
HALVES = {
    "cpu": st.integers(1, 70) | st.sampled_from([128]),
    # In vectors of 16 bytes where it is a multiple of 8 (4 in fp32), by elements else.
    "cuda": st.sampled_from([1, 3, 4, 8, 12, 16, 20, 33, 64]),
}


@given(
    data=st.data(),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.integers(1, 5),
    key_heads=st.integers(0, 2),
    kind=st.sampled_from(PLACES),
    interleaved=st.booleans(),
    inverse=st.booleans(),
)
def test_obeys_the_rule(
    form: Form,
    dtype: torch.dtype,
    data: st.DataObject,
    batch: int,
    length: int,
    heads: int,
    key_heads: int,
    kind: str,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Every input at the end of its memory; and the bits of the CPU."""
    ops, guarded, half = form.ops, form.guarded, data.draw(HALVES[form.name], "half")
    cos, sin = tables(half)
    *given_places, meant = places(kind, batch, length, half)
    where = (*(None if t is None else guarded(t) for t in (cos, sin, *given_places)), interleaved)
    q, k, v = (drawn(i, batch, length, n, 2 * half, dtype=dtype) for i, n in enumerate((heads, key_heads, key_heads)))
    rotated = ops.rope(guarded(q), guarded(k), *where, inverse)
    for got, x in zip(rotated, (q, k), strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        turn = (cos, -sin if inverse else sin, meant, interleaved)
        close(got, own(x, *turn), own(x.double(), *turn))
    # The same sums in the same order in every form of the op, and on the CPU.
    assert same(rotated, torch.ops.megapre.rope(q, k, *where, inverse))
    joined = torch.cat((*rotated, v), 2)
    if inverse:
        assert torch.equal(ops.rope_qkv_backward(guarded(q), guarded(k), guarded(v), *where), joined)
    else:
        qkv = guarded(torch.cat((q, k, v), 2))
        ops.rope_(qkv, heads + key_heads, *where)
        assert torch.equal(qkv, joined)


def by_head(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def far_apart(t: Tensor) -> Tensor:
    return torch.full((*t.shape, 2), torch.nan, dtype=t.dtype)[..., 0].copy_(t)


def off_by_one(t: Tensor) -> Tensor:
    return torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [8, 11])
def test_any_layout_gives_the_same_bits(form: Form, dtype: torch.dtype, interleaved: bool, half: int) -> None:
    ops, batch, length = form.ops, 2, 5
    where = (*tables(half), None, None, interleaved)
    q, k, v = (drawn(i, batch, length, n, 2 * half, dtype=dtype) for i, n in enumerate((3, 1, 1)))
    expected, gradient = ops.rope(q, k, *where, False), ops.rope_qkv_backward(q, k, v, *where)
    for layout in (by_head, far_apart, off_by_one):
        assert same(ops.rope(layout(q), layout(k), *where, False), expected)
        assert torch.equal(ops.rope_qkv_backward(layout(q), layout(k), layout(v), *where), gradient)
    qkv = torch.cat((q, k, v), 2)
    for layout in (by_head, off_by_one):
        turned = layout(qkv)
        ops.rope_(turned, 4, *where)
        assert same([turned[:, :, :3], turned[:, :, 3:4], turned[:, :, 4:]], [*expected, v])
    # One head that stands for all; tables that are views; positions that are one.
    one, (cos, sin) = q[:, :, :1].expand(q.shape), where[:2]
    views = (off_by_one(cos), torch.stack((sin, sin), -1)[..., 0], torch.arange(length).expand(batch, length), None)
    assert same(ops.rope(one, k, *views, interleaved, False), ops.rope(one.clone(), k, *where, False))


def test_in_place_touches_only_its_heads(form: Form, dtype: torch.dtype) -> None:
    where = (*tables(7), None, None, False)
    home = torch.full((2, 5, 6, 20), 7.0, dtype=dtype)
    qkv = home[:, :, :4, 3:17].copy_(drawn(0, 2, 5, 4, 14, dtype=dtype))
    before, version = qkv.clone(), home._version
    form.ops.rope_(qkv, 3, *where)
    assert home._version > version
    assert torch.equal(qkv[:, :, :3], form.ops.rope(before[:, :, :3], before[:, :, 3:], *where, False)[0])
    assert torch.equal(qkv[:, :, 3:], before[:, :, 3:])
    assert home[:, :, 4:].eq(7).all() and home[..., :3].eq(7).all() and home[..., 17:].eq(7).all()


def test_turning_back_gives_what_was_there(form: Form, dtype: torch.dtype) -> None:
    q, k = drawn(0, 2, 8, 3, 16, dtype=dtype), drawn(1, 2, 8, 1, 16, dtype=dtype)
    # The fp32 tables: cos^2 + sin^2 is 1 to an ulp. Two roundings of a value below 4.
    allowed = 8 * torch.finfo(dtype).eps + 1e-6
    for interleaved in (False, True):
        where = (*tables(8), None, None, interleaved)
        back = form.ops.rope(*form.ops.rope(q, k, *where, False), *where, True)
        torch.testing.assert_close(back, (q, k), rtol=0, atol=allowed)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [4, 8])
def test_offsets_beyond_31_bits(form: Form, far: Callable[[Tensor], Tensor], interleaved: bool, half: int) -> None:
    """Of rows, and in the second case of the tokens of one row."""
    ops, where = form.ops, (*tables(half), None, None, interleaved)
    q, k = (drawn(i, 3, 4, 2, 2 * half, dtype=torch.bfloat16) for i in range(2))
    for near, other in ((q, k), (q[:, 0][None], k[:, 0][None])):
        apart, other_apart = (far(t) if len(t) > 1 else far(t[0])[None] for t in (near, other))
        expected = ops.rope(near, other, *where, False)
        assert same(ops.rope(apart, other_apart, *where, False), expected)
        gradient = ops.rope_qkv_backward(near, other, near, *where)
        assert torch.equal(ops.rope_qkv_backward(apart, other_apart, apart, *where), gradient)
        ops.rope_(apart, 2, *where)
        assert torch.equal(apart, expected[0])


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)])
def test_empty_heads(form: Form, shape: tuple[int, ...]) -> None:
    x, documents = torch.empty(shape), torch.tensor([0, shape[0] * shape[1]], dtype=torch.int32)
    for cu_seqlens in (None, documents):
        where = (*tables(shape[3] // 2), None, cu_seqlens, False)
        assert all(t.shape == shape for t in form.ops.rope(x, x, *where, False))
        form.ops.rope_(x, shape[2], *where)
        assert form.ops.rope_qkv_backward(x, x, x, *where).shape == (*shape[:2], 3 * shape[2], shape[3])
