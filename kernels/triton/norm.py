# mypy: allow-untyped-defs, allow-incomplete-defs
"""RMS norm and layer norm with the residual addition fused, forward and backward.

    h = x + residual (rounded to the dtype of x);  n = h * rstd  or  (h - mean) * rstd;  y = n * weight (+ bias)
    g = dy * weight;  dh_total = (g - n * mean(g n) [- mean(g)]) * rstd + dh;  dweight = sum dy n;  dbias = sum dy
One kernel serves both: CENTRED is layer norm.

Bytes    forward 2 (with residual 4) passes over rows*H elements, backward 3 (4): every element is read once.
Floor    bytes / copy rate: 8192 x 4096 bf16 on an H200 (4.3 TB/s): forward 31 us, backward 47 us.
Measured forward 38 us. The backward's 126 us in the same table (kernels_nvidia-h200_2026-11-20 in benchmarks/results)
hold the host's enqueueing of it, which is longer than the kernel.

Forward: a row is one tile of registers, so the variance is taken in two passes without a second read; 32 elements a
thread, four 16-byte loads in flight, and as many programs as rows.
Backward: persistent. Each program walks rows with a stride, holding its part of dweight in registers; the next rows
are loaded before the present ones are worked on, because one tile per program would leave the memory idle during the
two reductions. One partial row per program, then `column_sum`: the same bits every time on one kind of machine.
Rows wider than 16,384 do not fit the registers of one program: they are walked in blocks (Chan et al. 1979 to merge
the blocks' variances), and dweight becomes a kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sum import column_sum
from .launch import as_rows, ceil_div, multiprocessors, next_power_of_2

WIDEST_TILE = 16384  # of one program's registers
WIDEST_HELD = 8192  # beside the sums of the weight's gradient
WIDE_BLOCK = 8192


@triton.jit
def forward_kernel(
    x, residual, weight, bias, y, h, mean, rstd, rows, columns, stride_x, stride_residual, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    exists = column < columns
    inside = (row < rows)[:, None] & exists[None, :]
    at = row.to(tl.int64)[:, None]
    value = tl.load(x + at * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + at * stride_residual + column[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    if BIAS:
        b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    if RESIDUAL:
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + at * columns + column[None, :], rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTRED:
        average = tl.sum(value, 1) / columns
        value = tl.where(inside, value - average[:, None], 0.0)
        rest = tl.sum(value, 1) / columns  # what the sum of values far from zero lost
        value = tl.where(inside, value - rest[:, None], 0.0)
        tl.store(mean + row, average + rest, mask=row < rows)
    scale = tl.rsqrt(tl.sum(value * value, 1) / columns + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    out = value * scale[:, None] * w[None, :]
    if BIAS:
        out += b[None, :]
    tl.store(y + at * columns + column[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy, dh, h, weight, mean, rstd, dx, partials, rows, columns, stride_dy, stride_dh, stride_h,
    CENTRED: tl.constexpr, DH: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    exists = column < columns
    w = tl.load(weight + column, mask=exists, other=0.0)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIAS:
        dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    row = program * ROWS + lane
    at = row.to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & exists[None, :]
    next_h = tl.load(h + at * stride_h + column[None, :], mask=inside, other=0.0)
    next_dy = tl.load(dy + at * stride_dy + column[None, :], mask=inside, other=0.0)
    for start in range(program * ROWS, rows, programs * ROWS):
        normed = next_h.to(tl.float32)
        grad = next_dy.to(tl.float32)
        row = start + lane
        inside = (row < rows)[:, None] & exists[None, :]
        at = row.to(tl.int64)[:, None]
        if DH:
            through = tl.load(dh + at * stride_dh + column[None, :], mask=inside, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        if CENTRED:
            average = tl.load(mean + row, mask=row < rows, other=0.0)
        ahead = row + programs * ROWS
        wanted = (ahead < rows)[:, None] & exists[None, :]
        at_ahead = ahead.to(tl.int64)[:, None]
        next_h = tl.load(h + at_ahead * stride_h + column[None, :], mask=wanted, other=0.0)
        next_dy = tl.load(dy + at_ahead * stride_dy + column[None, :], mask=wanted, other=0.0)
        if CENTRED:
            normed = normed - average[:, None]
        normed = normed * scale[:, None]
        dweight += grad * normed
        if BIAS:
            dbias += grad
        grad = grad * w.to(tl.float32)[None, :]
        along = tl.sum(grad * normed, 1) / columns
        out = grad - normed * along[:, None]
        if CENTRED:
            out = out - (tl.sum(grad, 1) / columns)[:, None]
        out = out * scale[:, None]
        if DH:
            out += through.to(tl.float32)
        tl.store(dx + at * columns + column[None, :], out.to(dx.dtype.element_ty), mask=inside)
    tl.store(partials + program * columns + column, tl.sum(dweight, 0), mask=exists)
    if BIAS:
        tl.store(partials + (programs + program) * columns + column, tl.sum(dbias, 0), mask=exists)


@triton.jit
def _means(h, dy, weight, average, scale, column, columns, CENTRED: tl.constexpr):
    """Of one row in registers: mean(g n) and mean(g)."""
    normed = (h.to(tl.float32) - average) * scale
    grad = dy.to(tl.float32) * tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    grad_mean = 0.0
    if CENTRED:
        grad_mean = tl.sum(grad, 0) / columns
    return tl.sum(grad * normed, 0) / columns, grad_mean


@triton.jit
def twice_backward_kernel(
    dy, dh, h, weight, mean, rstd, dx, partials, rows, columns, stride_dy, stride_dh, stride_h,
    CENTRED: tl.constexpr, DH: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As backward_kernel for one wide row at a time: the row is loaded again after its means are known, from L1.

    Sums of the weight's gradient leave no room in registers for a row in fp32; the next row waits there in 16 bits.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    exists = column < columns
    dweight = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        dbias = tl.zeros([BLOCK], tl.float32)
    at = tl.cast(program, tl.int64)
    next_scale = tl.load(rstd + at)
    next_average = 0.0
    if CENTRED:
        next_average = tl.load(mean + at)
    next_h = tl.load(h + at * stride_h + column, mask=exists, other=0.0)
    next_dy = tl.load(dy + at * stride_dy + column, mask=exists, other=0.0)
    next_along, next_mean = _means(next_h, next_dy, weight, next_average, next_scale, column, columns, CENTRED)
    for row in range(program, rows, programs):
        at = tl.cast(row, tl.int64)
        along, grad_mean, average, scale = next_along, next_mean, next_average, next_scale
        ahead = tl.minimum(at + programs, rows - 1)  # after the last of its rows a program looks at one in vain
        next_h = tl.load(h + ahead * stride_h + column, mask=exists, other=0.0)
        next_dy = tl.load(dy + ahead * stride_dy + column, mask=exists, other=0.0)
        next_scale = tl.load(rstd + ahead)
        if CENTRED:
            next_average = tl.load(mean + ahead)
        normed = tl.load(h + at * stride_h + column, mask=exists, other=0.0).to(tl.float32)
        normed = (normed - average) * scale
        grad = tl.load(dy + at * stride_dy + column, mask=exists, other=0.0).to(tl.float32)
        dweight += grad * normed
        if BIAS:
            dbias += grad
        grad = grad * tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
        out = (grad - normed * along - grad_mean) * scale
        if DH:
            out += tl.load(dh + at * stride_dh + column, mask=exists, other=0.0).to(tl.float32)
        tl.store(dx + at * columns + column, out.to(dx.dtype.element_ty), mask=exists)
        next_along, next_mean = _means(next_h, next_dy, weight, next_average, next_scale, column, columns, CENTRED)
    tl.store(partials + program * columns + column, dweight, mask=exists)
    if BIAS:
        tl.store(partials + (programs + program) * columns + column, dbias, mask=exists)


@triton.jit
def wide_forward_kernel(
    x, residual, weight, bias, y, h, mean, rstd, columns, stride_x, stride_residual, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    average = 0.0
    spread = 0.0  # sum of squared distances from the average so far
    for start in range(0, columns, BLOCK):
        column = start + lane
        exists = column < columns
        value = tl.load(x + row * stride_x + column, mask=exists, other=0.0).to(tl.float32)
        if RESIDUAL:
            value += tl.load(residual + row * stride_residual + column, mask=exists, other=0.0).to(tl.float32)
            rounded = value.to(h.dtype.element_ty)
            tl.store(h + row * columns + column, rounded, mask=exists)
            value = rounded.to(tl.float32)
        if CENTRED:
            count = tl.minimum(columns - start, BLOCK)
            here = tl.sum(value, 0) / count
            value = tl.where(exists, value - here, 0.0)
            step = here - average
            average += step * count / (start + count)
            spread += step * step * start * count / (start + count)
        spread += tl.sum(value * value, 0)
    scale = tl.rsqrt(spread / columns + eps)
    tl.store(rstd + row, scale)
    if CENTRED:
        tl.store(mean + row, average)
    if RESIDUAL:
        tl.debug_barrier()  # h is read back by other threads than those that wrote it
    for start in range(0, columns, BLOCK):
        column = start + lane
        exists = column < columns
        if RESIDUAL:
            value = tl.load(h + row * columns + column, mask=exists, other=0.0).to(tl.float32)
        else:
            value = tl.load(x + row * stride_x + column, mask=exists, other=0.0).to(tl.float32)
        out = (value - average) * scale * tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
        if BIAS:
            out += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
        tl.store(y + row * columns + column, out.to(y.dtype.element_ty), mask=exists)


@triton.jit
def wide_backward_kernel(
    dy, dh, h, weight, mean, rstd, dx, columns, stride_dy, stride_dh, stride_h,
    CENTRED: tl.constexpr, DH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    scale = tl.load(rstd + row)
    average = 0.0
    if CENTRED:
        average = tl.load(mean + row)
    along = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        exists = column < columns
        normed = (tl.load(h + row * stride_h + column, mask=exists, other=0.0).to(tl.float32) - average) * scale
        grad = tl.load(dy + row * stride_dy + column, mask=exists, other=0.0).to(tl.float32)
        grad = grad * tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
        along += grad * normed
        total += grad
    along_mean = tl.sum(along, 0) / columns
    grad_mean = 0.0
    if CENTRED:
        grad_mean = tl.sum(total, 0) / columns
    for start in range(0, columns, BLOCK):
        column = start + lane
        exists = column < columns
        normed = (tl.load(h + row * stride_h + column, mask=exists, other=0.0).to(tl.float32) - average) * scale
        grad = tl.load(dy + row * stride_dy + column, mask=exists, other=0.0).to(tl.float32)
        grad = grad * tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
        out = (grad - normed * along_mean - grad_mean) * scale
        if DH:
            out += tl.load(dh + row * stride_dh + column, mask=exists, other=0.0).to(tl.float32)
        tl.store(dx + row * columns + column, out.to(dx.dtype.element_ty), mask=exists)


@triton.jit
def wide_partials_kernel(
    dy, h, mean, rstd, partials, rows, columns, stride_dy, stride_h,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = column < columns
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for row in range(part, rows, parts):
        at = tl.cast(row, tl.int64)
        normed = tl.load(h + at * stride_h + column, mask=exists, other=0.0).to(tl.float32)
        if CENTRED:
            normed = normed - tl.load(mean + row)
        grad = tl.load(dy + at * stride_dy + column, mask=exists, other=0.0).to(tl.float32)
        dweight += grad * (normed * tl.load(rstd + row))
        dbias += grad
    tl.store(partials + part * columns + column, dweight, mask=exists)
    if BIAS:
        tl.store(partials + (parts + part) * columns + column, dbias, mask=exists)


def forward_policy(columns: int) -> tuple[int, int, int]:
    """(rows per program, tile width, warps): 32 elements a thread; several narrow rows share a program."""
    block = next_power_of_2(columns)
    rows = max(1, 4096 // block) if block < 1024 else 1
    return rows, block, min(max(rows * block // 1024, 1), 16)


def backward_policy(columns: int) -> tuple[int, int, int, int]:
    """(rows per program and step, tile width, warps, programs per multiprocessor): 16 elements a thread up to 8192.

    Two tensors of 16 elements a thread prefetched by 16 warps are 32 KiB in flight per multiprocessor; 26 KiB cover the
    memory's latency at full rate (4.3 TB/s * 800 ns / 132).
    """
    block = next_power_of_2(columns)
    rows = max(1, 4096 // block)
    warps = min(rows * block // 512, 16)
    return rows, block, warps, 16 // warps


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd): y and h shaped as x and contiguous, h empty without a residual, mean empty unless centred."""
    rows_x = as_rows(x)
    rows, columns = rows_x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(rows if centred else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, h, mean, rstd
    rows_r = rows_x if residual is None else as_rows(residual)
    weight = weight.contiguous()
    tensors = (rows_x, rows_r, weight, weight if bias is None else bias.contiguous(), y, h, mean, rstd)
    strides = (rows_x.stride(0), rows_r.stride(0), eps)
    flags = {"CENTRED": centred, "RESIDUAL": residual is not None, "BIAS": bias is not None}
    if columns > WIDEST_TILE:
        wide_forward_kernel[(rows,)](*tensors, columns, *strides, **flags, BLOCK=WIDE_BLOCK, num_warps=16)
    else:
        tile, block, warps = forward_policy(columns)
        grid = (ceil_div(rows, tile),)
        forward_kernel[grid](*tensors, rows, columns, *strides, **flags, ROWS=tile, BLOCK=block, num_warps=warps)
    return y, h, mean, rstd


def backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, centred: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias): dx shaped as h, dbias empty unless `bias`; both in the dtype of weight."""
    rows_h, rows_dy = as_rows(h), as_rows(dy)
    rows, columns = rows_h.shape
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not h.numel():
        return dx, torch.zeros_like(weight), torch.zeros_like(weight) if bias else weight.new_empty(0)
    rows_dh = rows_dy if dh is None else as_rows(dh)
    weight = weight.contiguous()
    strides = (rows_dy.stride(0), rows_dh.stride(0), rows_h.stride(0))
    flags: dict[str, int] = {"CENTRED": centred, "DH": dh is not None}
    count = 2 if bias else 1
    width = multiprocessors(h.device)
    if columns > WIDEST_TILE:
        wide_backward_kernel[(rows,)](
            rows_dy, rows_dh, rows_h, weight, mean, rstd, dx, columns, *strides, **flags, BLOCK=WIDE_BLOCK, num_warps=16
        )
        strips = ceil_div(columns, 1024)
        parts = min(max(1, 8 * width // strips), rows)
        partials = torch.empty(count, parts, columns, dtype=torch.float32, device=h.device)
        wide_partials_kernel[(strips, parts)](
            rows_dy, rows_h, mean, rstd, partials, rows, columns, strides[0], strides[2],
            CENTRED=centred, BIAS=bias, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    else:
        tile, block, warps, residency = backward_policy(columns)
        programs = min(width * residency, ceil_div(rows, tile))
        partials = torch.empty(count, programs, columns, dtype=torch.float32, device=h.device)
        arguments = (rows_dy, rows_dh, rows_h, weight, mean, rstd, dx, partials, rows, columns, *strides)
        flags |= {"BIAS": bias, "BLOCK": block, "num_warps": warps}
        if block > WIDEST_HELD:
            twice_backward_kernel[(programs,)](*arguments, **flags)
        else:
            backward_kernel[(programs,)](*arguments, **flags, ROWS=tile)
    sums = column_sum(partials, (weight.dtype,) * count)
    return dx, sums[0], sums[1] if bias else weight.new_empty(0)
