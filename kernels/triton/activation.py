# mypy: allow-untyped-defs, allow-incomplete-defs
"""Activations of a feed-forward layer: GELU (tanh or erf form, with a bias) and the gated SwiGLU and GeGLU.

    gelu   y = u Phi(u), u = x + bias;   gated  y = act(g) * u, x = [g, u], act silu or gelu (tanh)
The tanh form needs no tanh: (1 + tanh t) / 2 = sigmoid(2 t), which is one exponential and does not cancel.

Bytes    gated: forward 3 passes over rows*F elements, backward 5. gelu: forward 2, backward 3.
Floor    bytes / copy rate: swiglu 8192 x 14336 bf16 on an H200: forward 164 us, backward 273 us. Not timed yet.

One program a piece of a row, 16 elements a thread. Only x is kept for the backward. The bias gradient is a sum over
rows: there the programs are persistent over rows, one partial row each, added by `column_sum` in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sum import column_sum
from .launch import as_rows, ceil_div, multiprocessors

SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
GELU_ERF = tl.constexpr(2)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and its derivative; exp(-|x|) neither overflows nor leaves 1 - sigmoid to cancel."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    return tl.where(x >= 0, large, e * large), e * large * large


@triton.jit
def _value_and_slope(x, KIND: tl.constexpr):
    """act(x) and its derivative, fp32."""
    if KIND == GELU_ERF:
        phi = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        return x * phi, phi + (x * INV_SQRT_2PI) * tl.exp(-0.5 * x * x)
    elif KIND == GELU_TANH:
        phi, slope = _sigmoid((x + 0.044715 * x * x * x) * (2.0 * SQRT_2_OVER_PI))
        return x * phi, phi + x * slope * ((1.0 + 3.0 * 0.044715 * x * x) * (2.0 * SQRT_2_OVER_PI))
    else:
        phi, slope = _sigmoid(x)
        return x * phi, phi + x * slope


@triton.jit
def gated_kernel(x, y, width, stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    gate = tl.load(x + row * stride + column, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + width + column, mask=exists, other=0.0).to(tl.float32)
    act, _ = _value_and_slope(gate, KIND)
    tl.store(y + row * width + column, (act * up).to(y.dtype.element_ty), mask=exists)


@triton.jit
def gated_backward_kernel(dy, x, dx, width, stride_dy, stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    gate = tl.load(x + row * stride + column, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + width + column, mask=exists, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * stride_dy + column, mask=exists, other=0.0).to(tl.float32)
    act, slope = _value_and_slope(gate, KIND)
    out = dx + row * 2 * width + column
    tl.store(out, (grad * up * slope).to(dx.dtype.element_ty), mask=exists)
    tl.store(out + width, (grad * act).to(dx.dtype.element_ty), mask=exists)


@triton.jit
def gelu_kernel(x, bias, y, width, stride, BIAS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    u = tl.load(x + row * stride + column, mask=exists, other=0.0).to(tl.float32)
    if BIAS:
        u += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    act, _ = _value_and_slope(u, KIND)
    tl.store(y + row * width + column, act.to(y.dtype.element_ty), mask=exists)


@triton.jit
def gelu_backward_kernel(
    dy, x, bias, dx, partials, rows, width, stride_dy, stride,
    BIAS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    dbias = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    for index in range(first, rows, programs):
        row = tl.cast(index, tl.int64)
        u = tl.load(x + row * stride + column, mask=exists, other=0.0).to(tl.float32) + b
        grad = tl.load(dy + row * stride_dy + column, mask=exists, other=0.0).to(tl.float32)
        _, slope = _value_and_slope(u, KIND)
        out = grad * slope
        dbias += out
        tl.store(dx + row * width + column, out.to(dx.dtype.element_ty), mask=exists)
    if BIAS:
        tl.store(partials + first * width + column, dbias, mask=exists)


def policy(width: int) -> tuple[int, int]:
    """(block, warps): the largest block that wastes no more than a smaller one would, 16 elements a thread."""
    block = min((2048, 1024, 512), key=lambda b: ceil_div(width, b) * b)
    return block, block // 512


def gated_forward(x: Tensor, kind: int) -> Tensor:
    """x [..., 2F] -> y [..., F], contiguous."""
    rows = as_rows(x)
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if y.numel():
        block, warps = policy(width)
        grid = (rows.shape[0], ceil_div(width, block))
        gated_kernel[grid](rows, y, width, rows.stride(0), KIND=kind, BLOCK=block, num_warps=warps)
    return y


def gated_backward(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    """dx [..., 2F], contiguous, from dy [..., F] and x [..., 2F]."""
    rows, rows_dy = as_rows(x), as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        width = x.shape[-1] // 2
        block, warps = policy(width)
        gated_backward_kernel[(rows.shape[0], ceil_div(width, block))](
            rows_dy, rows, dx, width, rows_dy.stride(0), rows.stride(0), KIND=kind, BLOCK=block, num_warps=warps
        )
    return dx


def gelu_forward(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    """y shaped as x, contiguous; bias [F] is added first."""
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        block, warps = policy(rows.shape[1])
        gelu_kernel[(rows.shape[0], ceil_div(rows.shape[1], block))](
            rows, rows if bias is None else bias.contiguous(), y, rows.shape[1], rows.stride(0),
            BIAS=bias is not None, KIND=kind, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y


def gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """(dx shaped as x, dbias [F] in the dtype of bias, empty without one)."""
    rows, rows_dy = as_rows(x), as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not dx.numel():
        return dx, x.new_empty(0) if bias is None else torch.zeros_like(bias)
    width = rows.shape[1]
    block, warps = policy(width)
    strips = ceil_div(width, block)
    programs = rows.shape[0]
    if bias is not None:  # each program leaves a partial row: fewer of them, each over many rows
        programs = min(programs, ceil_div(16 * multiprocessors(x.device), strips))
    partials = torch.empty(1, programs if bias is not None else 0, width, dtype=torch.float32, device=x.device)
    gelu_backward_kernel[(programs, strips)](
        rows_dy, rows, rows if bias is None else bias.contiguous(), dx, partials, rows.shape[0], width,
        rows_dy.stride(0), rows.stride(0), BIAS=bias is not None, KIND=kind, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dx, x.new_empty(0) if bias is None else column_sum(partials, (bias.dtype,))[0]
