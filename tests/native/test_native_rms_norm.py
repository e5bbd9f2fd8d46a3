"""The C++ rms_norm, op by op: the 2x rule against fp64, layouts, empty input, poison, repeatability, errors."""

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
EPS = 1e-6
# One lane group is 8 to 32 elements: around and between its multiples, and wide rows.
WIDTHS = st.integers(1, 140) | st.sampled_from([256, 1000, 2049])


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.5).to(dtype)


def autograd(h: Tensor, weight: Tensor, dy: Tensor, dh: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dweight of torch's own rms_norm in the dtype of its arguments."""
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    y = F.rms_norm(h, weight.shape, weight, EPS)
    outputs, upstream = ((y, h * 1), (dy, dh)) if dh is not None else ((y,), (dy,))
    return y.detach(), *torch.autograd.grad(outputs, (h, weight), upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 70), width=WIDTHS, residual=st.booleans())
def test_obeys_the_rule(ops: Any, dtype: torch.dtype, rows: int, width: int, residual: bool) -> None:
    x, extra, dy, dh = (drawn(i, rows, width, dtype=dtype) for i in range(4))
    weight = drawn(4, width, dtype=dtype)
    y, h, rstd = ops.rms_norm(x, weight, EPS, extra if residual else None)
    if residual:
        assert torch.equal(h, x + extra)
    else:
        assert h.numel() == 0
        h = x
    dx, dweight = ops.rms_norm_backward(dy, dh if residual else None, h, weight, rstd)

    own = autograd(h, weight, dy, dh if residual else None)
    exact = autograd(h.double(), weight.double(), dy.double(), dh.double() if residual else None)
    for what, got, torchs, true in zip(("y", "dx", "dweight"), (y, dx, dweight), own, exact, strict=True):
        assert got.dtype == dtype
        close(got, torchs, true, what)


def test_long_columns_keep_their_digits(ops: Any, two_threads: None) -> None:
    """dweight sums 20,000 rows: partial sums must not lose more than torch's do."""
    x, dy, weight = drawn(0, 20_000, 40, dtype=torch.float32), drawn(1, 20_000, 40, dtype=torch.float32), torch.ones(40)
    _, _, rstd = ops.rms_norm(x, weight, EPS, None)
    _, dweight = ops.rms_norm_backward(dy, None, x, weight, rstd)
    own, exact = autograd(x, weight, dy, None), autograd(x.double(), weight.double(), dy.double(), None)
    close(dweight, own[2], exact[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_same_bits(ops: Any, dtype: torch.dtype) -> None:
    rows, width = 9, 77
    plain = [drawn(i, rows, width, dtype=dtype) for i in range(4)]
    weight = drawn(4, width, dtype=dtype)

    def run(x: Tensor, extra: Tensor, dy: Tensor, dh: Tensor, weight: Tensor) -> list[Tensor]:
        y, h, rstd = ops.rms_norm(x, weight, EPS, extra)
        dx, dweight = ops.rms_norm_backward(dy, dh, h, weight, rstd)
        assert all(t.is_contiguous() for t in (y, h, dx, dweight))
        return [y, h, rstd, dx, dweight]

    expected = run(*plain, weight)

    def padded(t: Tensor) -> Tensor:
        """The same values in rows that lie apart, with NaN between them."""
        return torch.full((rows, width + 5), torch.nan, dtype=dtype)[:, 2 : width + 2].copy_(t)

    every_second = torch.full((2 * width,), torch.nan, dtype=dtype)[::2].copy_(weight)
    assert same(run(*map(padded, plain), every_second), expected)
    assert same(run(*(t.t().contiguous().t() for t in plain), weight), expected)
    three_dims = run(*(t.view(3, 3, width).transpose(0, 1).contiguous().transpose(0, 1) for t in plain), weight)
    assert same([t.reshape(e.shape) for t, e in zip(three_dims, expected, strict=True)], expected)
    # A row that stands for many: stride 0.
    repeated = run(*(t[:1].expand(rows, width) for t in plain), weight)
    assert same(repeated[:4], run(*(t[:1].repeat(rows, 1) for t in plain), weight)[:4])


def test_weight_of_another_dtype(ops: Any) -> None:
    x, weight = drawn(0, 5, 33, dtype=torch.bfloat16), drawn(1, 33, dtype=torch.float32)
    y, _, rstd = ops.rms_norm(x, weight, EPS, None)
    dx, dweight = ops.rms_norm_backward(x, None, x, weight, rstd)
    assert (y.dtype, rstd.dtype, dx.dtype, dweight.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    exact = F.rms_norm(x.double(), (33,), weight.double(), EPS)
    close(y, F.rms_norm(x.float(), (33,), weight, EPS).bfloat16(), exact)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_empty(ops: Any, shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.ones(shape[-1])
    y, h, rstd = ops.rms_norm(x, weight, EPS, x)
    dx, dweight = ops.rms_norm_backward(y, None, h, weight, rstd)
    assert y.shape == h.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise(ops: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        x, dy, weight = (drawn(i, *s, dtype=torch.float32) for i, s in enumerate([(999, 515), (999, 515), (515,)]))
        _, _, rstd = ops.rms_norm(x, weight, EPS, None)
        first = ops.rms_norm_backward(dy, dy, x, weight, rstd)
        assert all(same(ops.rms_norm_backward(dy, dy, x, weight, rstd), first) for _ in range(5))
        own, exact = autograd(x, weight, dy, dy), autograd(x.double(), weight.double(), dy.double(), dy.double())
        close(first[0], own[1], exact[1], "dx")
        close(first[1], own[2], exact[2], "dweight")
    finally:
        torch.set_num_threads(1)


def test_one_bad_row_stays_alone(ops: Any) -> None:
    x = drawn(0, 6, 50, dtype=torch.float32)
    clean = ops.rms_norm(x, torch.ones(50), EPS, None)[0]
    x[2, 7] = torch.nan
    x[4, 0] = torch.inf
    y = ops.rms_norm(x, torch.ones(50), EPS, None)[0]
    assert y[2].isnan().all()
    assert y[4, 0].isnan() and torch.equal(y[4, 1:], torch.zeros(49))
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_rounds_to_bf16_as_torch_does(ops: Any) -> None:
    """Every bf16 number plus one far smaller, a denormal, a large one, and what is no number; ties go to even."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    scales = torch.tensor([0.0, 2.0**-9, -(2.0**-9), 3 * 2.0**-10, 2.0**-8, -1.0, torch.inf, torch.nan]).bfloat16()
    added = torch.cat(
        [x[None] * scales[:, None], torch.tensor([1e-40, 1.0, 3e38]).bfloat16()[:, None].expand(3, len(x))]
    )
    x = x.expand(len(added), len(x))
    h = ops.rms_norm(x, torch.ones(x.shape[1]), EPS, added)[1]
    torch.testing.assert_close(h, x + added, rtol=0, atol=0, equal_nan=True)


def test_offsets_beyond_31_bits(ops: Any, far: Callable[[Tensor], Tensor]) -> None:
    x, extra, dy, dh = (drawn(i, 3, 40, dtype=torch.bfloat16) for i in range(4))
    weight = drawn(4, 40, dtype=torch.bfloat16)
    y, h, rstd = ops.rms_norm(x, weight, EPS, extra)
    assert same(ops.rms_norm(far(x), weight, EPS, far(extra)), [y, h, rstd])
    expected = ops.rms_norm_backward(dy, dh, h, weight, rstd)
    assert same(ops.rms_norm_backward(far(dy), far(dh), far(h), weight, rstd), expected)


def test_errors_have_numbers(ops: Any) -> None:
    x, weight = torch.ones(4, 8), torch.ones(8)
    rstd = ops.rms_norm(x, weight, EPS, None)[2]
    with pytest.raises(ValueError, match=r"weight has shape \[7\] but rows of the input have 8"):
        ops.rms_norm(x, torch.ones(7), EPS, None)
    with pytest.raises(ValueError, match=r"residual is .*\[4, 9\] but x is .*\[4, 8\]"):
        ops.rms_norm(x, weight, EPS, torch.ones(4, 9))
    with pytest.raises(ValueError, match=r"residual is .*BFloat16"):
        ops.rms_norm(x, weight, EPS, x.bfloat16())
    with pytest.raises(TypeError, match="supported are fp32, bf16, fp16, fp64"):
        ops.rms_norm(x.int(), weight, EPS, None)
    with pytest.raises(ValueError, match=r"rstd is .* with 3 elements"):
        ops.rms_norm_backward(x, None, x, weight, rstd[:3])
    with pytest.raises(ValueError, match="no dimension"):
        ops.rms_norm(torch.tensor(1.0), weight, EPS, None)
