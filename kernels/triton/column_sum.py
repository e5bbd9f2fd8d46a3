# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over rows of a few fp32 partial rows: the last stage of every weight and bias gradient.

    out[j] = sum over i of partials[i, j]

Each persistent program of a backward kernel leaves one row of partial sums; adding them in a fixed order, by one
program per strip of columns, is deterministic and needs no atomics. P partial rows are P * columns * 4 bytes, in L2.
Timed as part of the backward of the norms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div


@triton.jit
def column_sum_kernel(
    partials, first, second, rows, columns, TWO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    base = partials + which.to(tl.int64) * rows * columns
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        at = start + row
        inside = (at < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(base + at[:, None] * columns + column[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if TWO:
        if which == 0:
            tl.store(first + column, result.to(first.dtype.element_ty), mask=column < columns)
        else:
            tl.store(second + column, result.to(second.dtype.element_ty), mask=column < columns)
    else:
        tl.store(first + column, result.to(first.dtype.element_ty), mask=column < columns)


def column_sum(partials: Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, ...]:
    """partials [n, P, columns] fp32, n = 1 or 2 -> n rows of sums over P, each in its dtype, one launch."""
    count, rows, columns = partials.shape
    out = tuple(torch.empty(columns, dtype=dtype, device=partials.device) for dtype in dtypes)
    if columns:
        block_c = 16 if columns <= 4096 else 32
        column_sum_kernel[(ceil_div(columns, block_c), count)](
            partials, out[0], out[-1], rows, columns, TWO=count == 2, BLOCK_R=256, BLOCK_C=block_c, num_warps=8
        )
    return out
