"""The C++ layer_norm, op by op: the 2x rule against fp64, layouts, empty input, poison, repeatability, errors."""

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
EPS = 1e-5
# One lane group is 8 to 32 elements: around and between its multiples, and wide rows.
WIDTHS = st.integers(1, 140) | st.sampled_from([256, 1000, 2049])


def drawn(seed: int, *shape: int, dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean).to(dtype)


def autograd(h: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, dh: Tensor | None) -> list[Tensor]:
    """y, dx, dweight and dbias (with a bias) of torch's own layer_norm in the dtype of its arguments."""
    leaves = [t.clone().requires_grad_() for t in (h, weight, *(() if bias is None else (bias,)))]
    y = F.layer_norm(leaves[0], weight.shape, leaves[1], leaves[2] if bias is not None else None, EPS)
    outputs, upstream = ((y, leaves[0] * 1), (dy, dh)) if dh is not None else ((y,), (dy,))
    return [y.detach(), *torch.autograd.grad(outputs, leaves, upstream)]


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 70), width=WIDTHS, residual=st.booleans(), affine=st.booleans())
def test_obeys_the_rule(ops: Any, dtype: torch.dtype, rows: int, width: int, residual: bool, affine: bool) -> None:
    x, extra, dy, dh = (drawn(i, rows, width, dtype=dtype) for i in range(4))
    weight, bias = drawn(4, width, dtype=dtype), drawn(5, width, dtype=dtype) if affine else None
    y, h, mean, rstd = ops.layer_norm(x, weight, bias, EPS, extra if residual else None)
    if residual:
        assert torch.equal(h, x + extra)
    else:
        assert h.numel() == 0
        h, dh = x, None
    dx, dweight, dbias = ops.layer_norm_backward(dy, dh, h, weight, bias, mean, rstd)
    assert affine or dbias.numel() == 0

    own = autograd(h, weight, bias, dy, dh)
    exact = autograd(*doubled(h, weight, bias, dy, dh))
    got = [y, dx, dweight, *([dbias] if affine else [])]
    for what, g, torchs, true in zip(("y", "dx", "dweight", "dbias"), got, own, exact, strict=False):
        assert g.dtype == dtype
        close(g, torchs, true, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("width", [1, 31, 768, 2049])
def test_rows_far_from_zero(ops: Any, dtype: torch.dtype, width: int) -> None:
    """A mean of five hundred deviations: a variance from sums of squares would have no digit left in fp32."""
    x, dy = drawn(0, 9, width, dtype=dtype, mean=1000.0), drawn(1, 9, width, dtype=dtype)
    weight, bias = drawn(2, width, dtype=dtype), drawn(3, width, dtype=dtype)
    y, _, mean, rstd = ops.layer_norm(x, weight, bias, EPS, None)
    got = [y, *ops.layer_norm_backward(dy, None, x, weight, bias, mean, rstd)]
    own, exact = autograd(x, weight, bias, dy, None), autograd(*doubled(x, weight, bias, dy, None))
    for what, g, torchs, true in zip(("y", "dx", "dweight", "dbias"), got, own, exact, strict=True):
        close(g, torchs, true, what)
    constant = torch.full((2, width), 1234.5, dtype=dtype)
    assert torch.equal(ops.layer_norm(constant, weight, bias, EPS, None)[0], bias.expand(2, width))


def test_long_columns_keep_their_digits(ops: Any, two_threads: None) -> None:
    """dweight and dbias sum 20,000 rows: partial sums must not lose more than torch's do."""
    x, dy = drawn(0, 20_000, 40, dtype=torch.float32), drawn(1, 20_000, 40, dtype=torch.float32)
    weight = torch.ones(40)
    _, _, mean, rstd = ops.layer_norm(x, weight, weight, EPS, None)
    _, dweight, dbias = ops.layer_norm_backward(dy, None, x, weight, weight, mean, rstd)
    own, exact = autograd(x, weight, weight, dy, None), autograd(*doubled(x, weight, weight, dy, None))
    close(dweight, own[2], exact[2], "dweight")
    close(dbias, own[3], exact[3], "dbias")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_same_bits(ops: Any, dtype: torch.dtype) -> None:
    rows, width = 9, 77
    plain = [drawn(i, rows, width, dtype=dtype) for i in range(4)]
    weight, bias = drawn(4, width, dtype=dtype), drawn(5, width, dtype=dtype)

    def run(x: Tensor, extra: Tensor, dy: Tensor, dh: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        y, h, mean, rstd = ops.layer_norm(x, weight, bias, EPS, extra)
        dx, dweight, dbias = ops.layer_norm_backward(dy, dh, h, weight, bias, mean, rstd)
        assert all(t.is_contiguous() for t in (y, h, dx, dweight, dbias))
        return [y, h, mean, rstd, dx, dweight, dbias]

    expected = run(*plain, weight, bias)

    def padded(t: Tensor) -> Tensor:
        """The same values in rows that lie apart, with NaN between them."""
        return torch.full((rows, width + 5), torch.nan, dtype=dtype)[:, 2 : width + 2].copy_(t)

    def every_second(t: Tensor) -> Tensor:
        return torch.full((2 * width,), torch.nan, dtype=dtype)[::2].copy_(t)

    assert same(run(*map(padded, plain), every_second(weight), every_second(bias)), expected)
    assert same(run(*(t.t().contiguous().t() for t in plain), weight, bias), expected)

    def alike(view: Any) -> bool:
        results = run(*map(view, plain), weight, bias)
        return same([t.reshape(e.shape) for t, e in zip(results, expected, strict=True)], expected)

    assert alike(lambda t: t.view(3, 3, width).transpose(0, 1).contiguous().transpose(0, 1))
    assert alike(lambda t: padded(t).unflatten(0, (3, 3)))  # three dims, and still one distance between rows
    assert alike(lambda t: padded(t).unflatten(0, (3, 3))[:, :, None])
    assert alike(lambda t: t.as_strided((rows, 1, width), (width, 999, 1)))  # a dim of one row has any stride
    # Rows that stand for many: stride 0.
    repeated = run(*(t[:1].expand(rows, width) for t in plain), weight, bias)
    assert same(repeated, run(*(t[:1].repeat(rows, 1) for t in plain), weight, bias))


def test_weights_of_another_dtype(ops: Any) -> None:
    x, weight, bias = drawn(0, 5, 33, dtype=torch.bfloat16), *(drawn(i, 33, dtype=torch.float32) for i in (1, 2))
    y, _, mean, rstd = ops.layer_norm(x, weight, bias.double(), EPS, None)
    dx, dweight, dbias = ops.layer_norm_backward(x, None, x, weight, bias.double(), mean, rstd)
    assert (y.dtype, mean.dtype, rstd.dtype, dx.dtype) == (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
    assert (dweight.dtype, dbias.dtype) == (torch.float32, torch.float64)
    exact = F.layer_norm(x.double(), (33,), weight.double(), bias.double(), EPS)
    close(y, F.layer_norm(x.float(), (33,), weight, bias, EPS).bfloat16(), exact)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_empty(ops: Any, shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.ones(shape[-1])
    y, h, mean, rstd = ops.layer_norm(x, weight, weight, EPS, x)
    dx, dweight, dbias = ops.layer_norm_backward(y, None, h, weight, weight, mean, rstd)
    assert y.shape == h.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1])) and torch.equal(dbias, torch.zeros(shape[-1]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise(ops: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        x, dy, weight = (drawn(i, *s, dtype=torch.float32) for i, s in enumerate([(999, 515), (999, 515), (515,)]))
        y, _, mean, rstd = ops.layer_norm(x, weight, weight, EPS, None)
        first = ops.layer_norm_backward(dy, dy, x, weight, weight, mean, rstd)
        for _ in range(5):
            assert same(ops.layer_norm(x, weight, weight, EPS, None)[2:], [mean, rstd])
            assert same(ops.layer_norm_backward(dy, dy, x, weight, weight, mean, rstd), first)
        own, exact = autograd(x, weight, weight, dy, dy), autograd(*doubled(x, weight, weight, dy, dy))
        for what, g, torchs, true in zip(("y", "dx", "dweight", "dbias"), [y, *first], own, exact, strict=True):
            close(g, torchs, true, what)
    finally:
        torch.set_num_threads(1)


def test_one_bad_row_stays_alone(ops: Any) -> None:
    x = drawn(0, 6, 50, dtype=torch.float32)
    clean = ops.layer_norm(x, torch.ones(50), None, EPS, None)[0]
    x[2, 7] = torch.nan
    x[4, 0] = torch.inf
    y = ops.layer_norm(x, torch.ones(50), None, EPS, None)[0]
    assert y[[2, 4]].isnan().all()
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_offsets_beyond_31_bits(ops: Any, far: Callable[[Tensor], Tensor]) -> None:
    x, extra, dy, dh = (drawn(i, 3, 40, dtype=torch.bfloat16) for i in range(4))
    weight, bias = drawn(4, 40, dtype=torch.bfloat16), drawn(5, 40, dtype=torch.bfloat16)
    y, h, mean, rstd = ops.layer_norm(x, weight, bias, EPS, extra)
    assert same(ops.layer_norm(far(x), weight, bias, EPS, far(extra)), [y, h, mean, rstd])
    expected = ops.layer_norm_backward(dy, dh, h, weight, bias, mean, rstd)
    assert same(ops.layer_norm_backward(far(dy), far(dh), far(h), weight, bias, mean, rstd), expected)


def test_errors_have_numbers(ops: Any) -> None:
    x, weight = torch.ones(4, 8), torch.ones(8)
    _, _, mean, rstd = ops.layer_norm(x, weight, None, EPS, None)
    with pytest.raises(ValueError, match=r"weight has shape \[7\] but rows of the input have 8"):
        ops.layer_norm(x, torch.ones(7), None, EPS, None)
    with pytest.raises(ValueError, match=r"bias has shape \[7\] but weight has shape \[8\]"):
        ops.layer_norm(x, weight, torch.ones(7), EPS, None)
    with pytest.raises(ValueError, match=r"residual is .*\[4, 9\] but x is .*\[4, 8\]"):
        ops.layer_norm(x, weight, None, EPS, torch.ones(4, 9))
    with pytest.raises(TypeError, match="supported are fp32, bf16, fp16, fp64"):
        ops.layer_norm(x.int(), weight, None, EPS, None)
    with pytest.raises(ValueError, match=r"rstd is .* with 3 elements"):
        ops.layer_norm_backward(x, None, x, weight, None, mean, rstd[:3])
    with pytest.raises(ValueError, match=r"mean is Double with 4 elements"):
        ops.layer_norm_backward(x, None, x, weight, None, mean.double(), rstd)
    with pytest.raises(ValueError, match=r"dh is .*\[4, 9\] but h is .*\[4, 8\]"):
        ops.layer_norm_backward(x, torch.ones(4, 9), x, weight, None, mean, rstd)
    with pytest.raises(ValueError, match="no dimension"):
        ops.layer_norm(torch.tensor(1.0), weight, None, EPS, None)
