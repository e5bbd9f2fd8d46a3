# mypy: allow-untyped-defs, allow-incomplete-defs
"""AdamW on a flat shard in one launch; learning rate, step, gradient scale and overflow flag are read on the device.

    g = grad * grad_scale;   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    master = master (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps);   param = master rounded

Bytes    an element: grad 2 or 4 read, master, m, v 12 read and 12 written, bf16 parameter 2 written.
Floor    bytes / copy rate: 6.5 ms per 1e9 parameters with bf16 gradients on an H200.
Measured 86% of copy (250M, bf16 gradients; kernels_nvidia-h200_2026-11-20 in benchmarks/results), when bf16 tiles had
         a layout of their own (an exchange through shared memory with six barriers a block), divisions and roots were
         IEEE's, and 16 programs a multiprocessor were launched of which 6 fitted. This form: not yet run on a GPU.

A thread has 4 neighbours of each tensor, 16 bytes of fp32 and 8 of bf16: no element changes hands. 8 programs of 128
threads fit a multiprocessor with up to 64 registers a thread, all at once, and have 112 KiB of loads under way.

Nothing on the host waits or branches, so the launch can be captured in a CUDA graph: with the overflow flag set there
are no blocks to walk. Scalars of the launch are fp32; 1 - b and log b are rounded from fp64 once each, and
1 - b^t = -expm1(t log b) keeps its digits at the first steps, where 1 - b^t in fp32 would lose four of seven.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, multiprocessors

RESIDENT = 8  # programs of a multiprocessor


class Average(NamedTuple):
    """Of a moment: beta, 1 - beta and log beta."""

    beta: float
    rest: float
    log_beta: float


def average(beta: float) -> Average:
    """What the kernels are told of a beta in [0, 1)."""
    return Average(beta, 1.0 - beta, math.log(beta) if beta else -math.inf)


@triton.jit
def one_minus_exp(y):
    """1 - exp(y) for y <= 0 in fp32, to a few units in the last place: a series where the subtraction would cancel."""
    series = 1.0 + y / 8.0
    series = 1.0 + y / 7.0 * series
    series = 1.0 + y / 6.0 * series
    series = 1.0 + y / 5.0 * series
    series = 1.0 + y / 4.0 * series
    series = 1.0 + y / 3.0 * series
    series = 1.0 + y / 2.0 * series
    return tl.where(y > -0.4, -y * series, 1.0 - tl.exp(y))


@triton.jit
def adamw_kernel(
    param, master, exp_avg, exp_avg_sq, grad, lr_at, step_at, scale_at, found_inf_at, count,
    first, second, eps, weight_decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """`param` is None where the master is it; `first` and `second` are the `Average` of the moments."""
    blocks = tl.cdiv(tl.cast(count, tl.int64), BLOCK)  # count + BLOCK - 1 may pass 2^31
    if found_inf_at is not None:
        blocks = tl.where(tl.load(found_inf_at) != 0, 0, blocks)
    lr = tl.load(lr_at).to(tl.float32)
    step = tl.load(step_at).to(tl.float32)
    decay = 1.0 - lr * weight_decay
    rate = lr / one_minus_exp(step * first.log_beta)
    inverse2 = 1.0 / one_minus_exp(step * second.log_beta)
    if scale_at is not None:
        scale = tl.load(scale_at).to(tl.float32)
    lane = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + lane
        inside = at < count
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        p = tl.load(master + at, mask=inside, other=0.0)
        if scale_at is not None:
            g = g * scale
        m = first.beta * m + first.rest * g
        v = second.beta * v + second.rest * g * g
        p = p * decay - rate * m / (tl.sqrt(v * inverse2) + eps)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        tl.store(master + at, p, mask=inside)
        if param is not None:
            tl.store(param + at, p.to(param.dtype.element_ty), mask=inside)


def step_(
    param: Tensor | None,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *told: Any,
) -> None:
    """One update in place; `told` is `Update.arguments`. All flat and contiguous, of one length; master and moments
    fp32; scalars 0-dim, on the device.

    `param` None: the master is the parameter. ValueError when a tensor of the state is not contiguous or not fp32.
    """
    lr, step, grad_scale, found_inf, beta1, beta2, eps, weight_decay = told
    state = (master, exp_avg, exp_avg_sq)
    param = master if param is None else param
    if not all(t.is_contiguous() for t in (param, grad, *state)) or any(t.dtype != torch.float32 for t in state):
        raise ValueError(
            f"adamw_: the state must be contiguous and fp32; strides are "
            f"{[t.stride() for t in (param, grad, *state)]}, dtypes {[t.dtype for t in state]}"
        )
    count = master.numel()
    if count:
        block = 1024
        separate = param.dtype != master.dtype or param.data_ptr() != master.data_ptr()
        adamw_kernel[(min(ceil_div(count, block), RESIDENT * multiprocessors(master.device)),)](
            param if separate else None, master, exp_avg, exp_avg_sq, grad, lr, step, grad_scale, found_inf, count,
            average(beta1), average(beta2), eps, weight_decay, BLOCK=block, num_warps=4,
        )  # fmt: skip
