"""The C++ gelu, swiglu and geglu: the 2x rule against fp64, layouts, far values, poison, repeatability, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor
from torch.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One lane group is 8 to 32 elements: around and between its multiples, and wide rows.
WIDTHS = st.integers(1, 140) | st.sampled_from([256, 1000, 2049])
GATES = {"swiglu": F.silu, "geglu": lambda g: F.gelu(g, approximate="tanh")}


def drawn(seed: int, *shape: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def own_gelu(x: Tensor, bias: Tensor | None, dy: Tensor, tanh: bool) -> list[Tensor]:
    """y, dx and dbias (with a bias) of torch's own gelu in the dtype of its arguments."""
    leaves = [t.clone().requires_grad_() for t in (x, *(() if bias is None else (bias,)))]
    y = F.gelu(sum(leaves[1:], leaves[0]), approximate="tanh" if tanh else "none")
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def native_gelu(ops: Any, x: Tensor, bias: Tensor | None, dy: Tensor, tanh: bool) -> list[Tensor]:
    dx, dbias = ops.gelu_backward(dy, x, bias, tanh)
    assert bias is not None or dbias.numel() == 0
    return [ops.gelu(x, bias, tanh), dx, *(() if bias is None else (dbias,))]


def own_gated(name: str, x: Tensor, dy: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    y = GATES[name](gate) * up
    return [y.detach(), *torch.autograd.grad(y, leaf, dy)]


def native_gated(ops: Any, name: str, x: Tensor, dy: Tensor) -> list[Tensor]:
    return [getattr(ops, name)(x), getattr(ops, f"{name}_backward")(dy, x)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 70), width=WIDTHS, with_bias=st.booleans(), tanh=st.booleans())
def test_gelu_obeys_the_rule(ops: Any, dtype: torch.dtype, rows: int, width: int, with_bias: bool, tanh: bool) -> None:
    x, dy, bias = (drawn(i, *s, dtype=dtype) for i, s in enumerate([(rows, width), (rows, width), (width,)]))
    bias = bias if with_bias else None
    got, own = native_gelu(ops, x, bias, dy, tanh), own_gelu(x, bias, dy, tanh)
    exact = own_gelu(x.double(), None if bias is None else bias.double(), dy.double(), tanh)
    for what, g, torchs, true in zip(("y", "dx", "dbias"), got, own, exact, strict=False):
        assert g.dtype == dtype
        close(g, torchs, true, what)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 9), width=WIDTHS)
def test_gates_obey_the_rule(ops: Any, name: str, dtype: torch.dtype, rows: int, width: int) -> None:
    x, dy = drawn(0, rows, 2 * width, dtype=dtype), drawn(1, rows, width, dtype=dtype)
    got, own, exact = native_gated(ops, name, x, dy), own_gated(name, x, dy), own_gated(name, x.double(), dy.double())
    for what, g, torchs, true in zip(("y", "dx"), got, own, exact, strict=True):
        assert g.dtype == dtype
        close(g, torchs, true, what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude(ops: Any, dtype: torch.dtype) -> None:
    """Value and slope, element by element, from the smallest numbers to the largest."""
    size = torch.logspace(-6, 2, 4001, dtype=torch.float64)
    x = torch.cat([-size, size]).to(dtype)
    far = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)

    def gate(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x)])[None]  # up = 1

    def ones(x: Tensor) -> Tensor:
        return torch.ones_like(x)[None]

    ways = {
        "tanh": lambda x: native_gelu(ops, x[None], None, ones(x), True),
        "erf": lambda x: native_gelu(ops, x[None], None, ones(x), False),
        "silu": lambda x: [t[:, : len(x)] for t in native_gated(ops, "swiglu", gate(x), ones(x))],
    }
    owns = {
        "tanh": lambda x: own_gelu(x[None], None, ones(x), True),
        "erf": lambda x: own_gelu(x[None], None, ones(x), False),
        "silu": lambda x: [t[:, : len(x)] for t in own_gated("swiglu", gate(x), ones(x))],
    }
    for name, way in ways.items():
        for what, g, torchs, true in zip(("y", "dx"), way(x), owns[name](x), owns[name](x.double()), strict=True):
            # By size: the error among small numbers is not hidden by the ulp of large ones.
            for low in range(-6, 2):
                here = (x.double().abs() >= 10.0**low) & (x.double().abs() < 10.0 ** (low + 1))
                close(g[0][here], torchs[0][here], true[0][here], f"{name} {what} at 1e{low}")
        y, slope = (t.double() for t in way(far))
        assert y[0, 0] == far[0] and y[0, 1].abs() < 1e-30, name
        assert slope[0, 0] == 1 and slope[0, 1].abs() < 1e-30, name
        y, slope = way(torch.full((40,), torch.nan, dtype=dtype))
        assert y.isnan().all() and slope.isnan().all(), name


def test_long_columns_keep_their_digits(ops: Any, two_threads: None) -> None:
    """dbias sums 20,000 rows: partial sums must not lose more than torch's do."""
    x, dy, bias = (drawn(i, *s, dtype=torch.float32) for i, s in enumerate([(20_000, 40), (20_000, 40), (40,)]))
    own, exact = own_gelu(x, bias, dy, True), own_gelu(x.double(), bias.double(), dy.double(), True)
    close(native_gelu(ops, x, bias, dy, True)[2], own[2], exact[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_same_bits(ops: Any, dtype: torch.dtype) -> None:
    rows, width = 9, 78
    x, dy, bias = (drawn(i, *s, dtype=dtype) for i, s in enumerate([(rows, width), (rows, width), (width,)]))

    def run(x: Tensor, dy: Tensor, bias: Tensor) -> list[Tensor]:
        half = dy[..., : width // 2]
        results = native_gelu(ops, x, bias, dy, True) + native_gelu(ops, x, None, dy, False)
        results += native_gated(ops, "swiglu", x, half) + native_gated(ops, "geglu", x, half)
        assert all(t.is_contiguous() for t in results)
        return results

    expected = run(x, dy, bias)

    def padded(t: Tensor) -> Tensor:
        """The same values in rows that lie apart, with NaN between them."""
        return torch.full((rows, width + 5), torch.nan, dtype=dtype)[:, 2 : width + 2].copy_(t)

    assert same(run(padded(x), padded(dy), torch.stack([bias, bias], 1)[:, 0]), expected)
    assert same(run(x.t().contiguous().t(), dy.t().contiguous().t(), bias), expected)
    for view in (lambda t: t.view(3, 3, width), lambda t: t.view(3, 3, width).transpose(0, 1).contiguous().mT.mT):
        three_dims = run(view(x), view(dy), bias)
        order = torch.arange(rows).view(3, 3)
        order = order if torch.equal(view(x)[0, 1], x[1]) else order.T
        for got, wanted in zip(three_dims, expected, strict=True):
            if got.dim() == 3:
                assert torch.equal(got.flatten(0, 1), wanted[order.flatten()])
    one_for_all = run(x, dy[:1].expand(rows, width), bias)
    assert same(one_for_all, run(x, dy[:1].repeat(rows, 1), bias))
    line = run(x[0], dy[0], bias)
    assert torch.equal(line[0], expected[0][0]) and torch.equal(line[5], expected[5][0])


def test_bias_of_another_dtype(ops: Any) -> None:
    x, bias = drawn(0, 5, 33, dtype=torch.bfloat16), drawn(1, 33, dtype=torch.float32)
    y, dx, dbias = native_gelu(ops, x, bias, x, True)
    assert (y.dtype, dx.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    own, exact = own_gelu(x.float(), bias, x.float(), True), own_gelu(x.double(), bias.double(), x.double(), True)
    close(y, own[0].bfloat16(), exact[0])
    close(dbias, own[2], exact[2])


def test_no_nan_is_rounded_to_a_number(ops: Any) -> None:
    """The bits of a NaN are the bias's: all ones, to which no unit can be added."""
    bias = torch.full((40,), -1, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(3, 40, dtype=dtype)
        assert ops.gelu(x, bias, True).isnan().all() and ops.gelu_backward(x, x, bias, True)[0].isnan().all()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_empty(ops: Any, shape: tuple[int, ...]) -> None:
    x, bias = torch.empty(shape), torch.ones(shape[-1])
    y, dx, dbias = native_gelu(ops, x, bias, x, True)
    assert y.shape == dx.shape == shape and torch.equal(dbias, torch.zeros(shape[-1]))
    half = (*shape[:-1], shape[-1] // 2)
    y, dx = native_gated(ops, "swiglu", x, torch.empty(half))
    assert y.shape == half and dx.shape == shape


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise(ops: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        x, dy, bias = (drawn(i, *s, dtype=torch.float32) for i, s in enumerate([(999, 516), (999, 516), (516,)]))
        first = native_gelu(ops, x, bias, dy, True) + native_gated(ops, "swiglu", x, dy[:, :258])
        for _ in range(5):
            again = native_gelu(ops, x, bias, dy, True) + native_gated(ops, "swiglu", x, dy[:, :258])
            assert same(again, first)
        own, exact = own_gelu(x, bias, dy, True), own_gelu(x.double(), bias.double(), dy.double(), True)
        for what, g, torchs, true in zip(("y", "dx", "dbias"), first, own, exact, strict=False):
            close(g, torchs, true, what)
    finally:
        torch.set_num_threads(1)


def test_offsets_beyond_31_bits(ops: Any, far: Callable[[Tensor], Tensor]) -> None:
    x, dy, bias = (drawn(i, *s, dtype=torch.bfloat16) for i, s in enumerate([(3, 40), (3, 40), (40,)]))
    for with_bias in (bias, None):
        assert same(native_gelu(ops, far(x), with_bias, far(dy), True), native_gelu(ops, x, with_bias, dy, True))
    for name in GATES:
        assert same(native_gated(ops, name, far(x), far(dy[:, :20])), native_gated(ops, name, x, dy[:, :20]))


def test_errors_have_numbers(ops: Any) -> None:
    x = torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"bias has shape \[7\] but rows of the input have 8"):
        ops.gelu(x, torch.ones(7), True)
    with pytest.raises(ValueError, match=r"gelu_backward: dy is .*\[4, 7\] but y is .*\[4, 8\]"):
        ops.gelu_backward(torch.ones(4, 7), x, None, True)
    with pytest.raises(ValueError, match=r"dy is BFloat16"):
        ops.gelu_backward(x.bfloat16(), x, None, True)
    with pytest.raises(TypeError, match="gelu: dtype Int; supported are fp32, bf16, fp16, fp64"):
        ops.gelu(x.int(), None, True)
    with pytest.raises(ValueError, match="the last dim is 7; gate and up need an even one"):
        ops.swiglu(torch.ones(4, 7))
    with pytest.raises(ValueError, match=r"geglu_backward: dy is .*\[4, 8\] but y is .*\[4, 4\]"):
        ops.geglu_backward(x, x)
    with pytest.raises(ValueError, match="no dimension"):
        ops.swiglu(torch.tensor(1.0))
