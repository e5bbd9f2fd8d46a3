# mypy: allow-untyped-defs, allow-incomplete-defs
"""AdamW of a bf16 parameter that is its own master, rounded at random by the bits of kernels/philox.py: one launch.

The update is adamw.py's; what is bf16 is then rounded up or down by 16 bits that follow from seed, step, stream and the
element's number alone: the same bits as on the CPU, whatever the blocks, the ranks or the alignment of a shard.

Bytes    an element: grad 2 or 4 and parameter 2 read, parameter 2 written; fp32 moments 8 read and 8 written, bf16 ones
         4 and 4: 22 and 14 with bf16 gradients.
FLOPs    about 30 in fp32. One Philox of 10 rounds, about 100 integer instructions, gives the bits of 8 elements: 13 an
         element, and 39 where the moments are rounded too.
Floor    bytes / copy rate with fp32 moments: on an H200 4.9 ms per 1e9 parameters. With bf16 moments the integer
         instructions are the longer: 39e9 at 132 x 64 a clock of 1.8 GHz, 2.6 ms, beside as many in fp32, and 3.1 ms of
         memory traffic.
Measured not yet run on a GPU.

A group of 128 elements has 16 counters; the four words of counter c give elements 4c .. 4c + 3 of the group's first
half and of its second half. A tile is that: [counters, 4] elements of either half, so that a thread holds a counter and
the 4 neighbours of its words, and neither bits nor elements change hands.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import GROUP
from .adamw import RESIDENT, average, one_minus_exp
from .launch import ceil_div, multiprocessors


@triton.jit
def _bits(word0, word1, quarter):
    """[counters, 4]: the halves of two words of each counter, lower half first."""
    word = tl.where(quarter < 2, word0, word1)
    return (word >> ((quarter & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _rounded(x, bits):
    """fp32 in bf16, up with the share of the spacing that is cut off; what is not finite as it is."""
    held = x.to(tl.uint32, bitcast=True)
    kept = ((held + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((held & 0x7F800000) == 0x7F800000, x.to(tl.bfloat16), kept)


@triton.jit
def adamw_stochastic_kernel(
    param, exp_avg, exp_avg_sq, grad, lr_at, step_at, scale_at, found_inf_at, count, first_group, skew, key0, key1,
    first, second, eps, weight_decay, BF16_MOMENTS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """`count` elements, the first of which is number `skew` of group `first_group`."""
    blocks = tl.cdiv(tl.cast(count, tl.int64) + skew, 8 * COUNTERS)
    if found_inf_at is not None:
        blocks = tl.where(tl.load(found_inf_at) != 0, 0, blocks)
    lr = tl.load(lr_at).to(tl.float32)
    step = tl.load(step_at)
    decay = 1.0 - lr * weight_decay
    rate = lr / one_minus_exp(step.to(tl.float32) * first.log_beta)
    inverse2 = 1.0 / one_minus_exp(step.to(tl.float32) * second.log_beta)
    if scale_at is not None:
        scale = tl.load(scale_at).to(tl.float32)
    key0 = tl.cast(key0, tl.int32).to(tl.uint32, bitcast=True)
    key1 = tl.cast(key1, tl.int32).to(tl.uint32, bitcast=True)
    lane = tl.arange(0, COUNTERS)[:, None]
    quarter = tl.arange(0, 4)[None, :]
    within = lane // 16 * 128 + lane % 16 * 4 + quarter
    nothing = tl.zeros([COUNTERS, 1], tl.uint32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        counter = (tl.cast(first_group, tl.int64) + tl.cast(block, tl.int64) * (COUNTERS // 16)) * 16 + lane
        low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        now = nothing + step.to(tl.int64).to(tl.uint32)
        p0, p1, p2, p3 = tl.philox_impl(low, high, now, nothing, key0, key1)
        if BF16_MOMENTS:
            m0, m1, m2, m3 = tl.philox_impl(low, high, now, nothing + 1, key0, key1)
            v0, v1, v2, v3 = tl.philox_impl(low, high, now, nothing + 2, key0, key1)
        for half in tl.static_range(2):
            at = tl.cast(block, tl.int64) * (8 * COUNTERS) + within + 64 * half - skew
            inside = (at >= 0) & (at < count)
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
            p = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
            if scale_at is not None:
                g = g * scale
            m = first.beta * m + first.rest * g
            v = second.beta * v + second.rest * g * g
            p = p * decay - rate * m / (tl.sqrt(v * inverse2) + eps)
            if half == 0:
                tl.store(param + at, _rounded(p, _bits(p0, p1, quarter)), mask=inside)
            else:
                tl.store(param + at, _rounded(p, _bits(p2, p3, quarter)), mask=inside)
            if BF16_MOMENTS and half == 0:
                tl.store(exp_avg + at, _rounded(m, _bits(m0, m1, quarter)), mask=inside)
                tl.store(exp_avg_sq + at, _rounded(v, _bits(v0, v1, quarter)), mask=inside)
            elif BF16_MOMENTS:
                tl.store(exp_avg + at, _rounded(m, _bits(m2, m3, quarter)), mask=inside)
                tl.store(exp_avg_sq + at, _rounded(v, _bits(v2, v3, quarter)), mask=inside)
            else:
                tl.store(exp_avg + at, m, mask=inside)
                tl.store(exp_avg_sq + at, v, mask=inside)


def _signed(word: int) -> int:
    """The 32 bits of `word` as a signed number: one type of argument for every seed."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def step_(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *told: Any) -> None:
    """One update in place; `told` is `Update.arguments`, the seed and the number of element 0. All flat and contiguous,
    of one length; bf16 parameter, moments both fp32 or both bf16; scalars 0-dim, on the device.

    ValueError when a tensor is not contiguous.
    """
    lr, step, grad_scale, found_inf, beta1, beta2, eps, weight_decay, seed, offset = told
    state = (param, exp_avg, exp_avg_sq, grad)
    if not all(t.is_contiguous() for t in state):
        raise ValueError(f"adamw_stochastic_: the state must be contiguous; strides are {[t.stride() for t in state]}")
    count, skew = param.numel(), offset % GROUP
    if count:
        counters = 128
        blocks = ceil_div(count + skew, 8 * counters)
        adamw_stochastic_kernel[(min(blocks, RESIDENT * multiprocessors(param.device)),)](
            param, exp_avg, exp_avg_sq, grad, lr, step, grad_scale, found_inf,
            count, offset // GROUP, skew, _signed(seed), _signed(seed >> 32),
            average(beta1), average(beta2), eps, weight_decay,
            BF16_MOMENTS=exp_avg.dtype == torch.bfloat16, COUNTERS=counters, num_warps=4,
        )  # fmt: skip
