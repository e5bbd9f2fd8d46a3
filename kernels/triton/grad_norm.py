# mypy: allow-untyped-defs, allow-incomplete-defs
"""Euclidean norm of flat gradients: one read, the same bits every time, no host sync.

    norm = sqrt(sum of g^2)

Bytes    one read of every gradient. Floor: bytes / read rate: fp32, 0.93 ms per 1e9 on an H200.
Measured at the copy rate (500M fp32; kernels_nvidia-h200_2026-11-20 in benchmarks/results).

Blocks of a fixed 65,536 elements, whatever the machine: each is one fp32 partial sum, added per thread and then as a
tree; the partial sums of all tensors are added in fp64 by one program. inf and NaN pass through.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div

CHUNK = 65536


@triton.jit
def square_sum_kernel(grad, partials, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    begin = chunk.to(tl.int64) * CHUNK
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at = begin + start + lane
        g = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
        total += g * g
    tl.store(partials + chunk, tl.sum(total, 0))


@triton.jit
def root_kernel(partials, norm, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(partials + start + lane, mask=start + lane < count, other=0.0).to(tl.float64)
    tl.store(norm, tl.sqrt(tl.sum(total, 0)).to(tl.float32))


def norm(grads: Sequence[Tensor]) -> Tensor:
    """0-dim fp32. Each gradient is read as it lies in memory; one that is not contiguous is copied first."""
    flat = [g.detach().reshape(-1) for g in grads if g.numel()]
    device = grads[0].device if grads else torch.device("cpu")
    out = torch.zeros((), dtype=torch.float32, device=device)
    if not flat:
        return out
    chunks = [ceil_div(g.numel(), CHUNK) for g in flat]
    partials = torch.empty(sum(chunks), dtype=torch.float32, device=device)
    for g, part in zip(flat, partials.split(chunks), strict=True):
        square_sum_kernel[(part.numel(),)](g, part, g.numel(), CHUNK=CHUNK, BLOCK=4096, num_warps=8)
    root_kernel[(1,)](partials, out, partials.numel(), BLOCK=1024, num_warps=4)
    return out
