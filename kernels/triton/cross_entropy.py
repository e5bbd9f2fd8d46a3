# mypy: allow-untyped-defs, allow-incomplete-defs
"""Cross-entropy of rows of logits, in place or not.

    lse = max + log(sum exp(x - max));  loss = lse - (1 - s) x_label - s mean(x) + z lse^2
    dloss/dx_j = softmax_j (1 + 2 z lse) - (1 - s) [j == label] - s / vocab               (terms:
    kernels/cross_entropy.py)

Bytes    losses alone: one read. In place: one read for the statistics, then a read and a write of a row that one
         program has just seen, so it is in L2 as long as the rows under way fit: 132 programs x 256 KiB (131,072
         bf16) are 33 of 60 MB, hence one program per multiprocessor for such rows. The second walk goes backwards:
         what was read last is surest to be there. HBM sees one read and one write.
Floor    2 * bytes of the logits / copy rate: 8192 x 131072 bf16 on an H200, 1.0 ms.
Measured 1.53 ms, 65% of copy (kernels_nvidia-h200_2026-11-20 in benchmarks/results), of a form with 28 instructions a
         logit: 1.0 ms at four a clock, and 1.1 ms of its half-rate pipe, in phases that one program a multiprocessor
         cannot hide behind its loads. Most of them compared columns. This form has 18, none of them a comparison, and
         its half-rate pipe is busy for 0.4 ms. Not yet run on a GPU.

Max and sum are kept per vector of one 16-byte load, inside a thread: no exchange between threads until the end of the
row, and 9 exponentials per 8 elements. The next block is loaded before the present one is worked on. Only the blocks
that reach beyond vocab are masked, and the label's element is written by itself. A row that will be read again is kept
in L2 before others, and one that is done with leaves it first: without that, rows already written push out those of
which one half is still to come back. Row offsets are 64-bit. A label outside [0, vocab) that is not ignore_index gives
a NaN loss and a NaN gradient row, and reads nothing.

Logits whose columns lie in shards: vocab_parallel.py, which calls the walks over a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def _add_block(x, exists, top, total, plain, MASKED: tl.constexpr, SMOOTHING: tl.constexpr):
    """What row_statistics holds of each vector of a block, with one more block x of them."""
    x = x.to(tl.float32)
    if SMOOTHING and MASKED:
        plain += tl.sum(tl.where(exists, x, 0.0), 1)
    elif SMOOTHING:
        plain += tl.sum(x, 1)
    if MASKED:
        x = tl.where(exists, x, NEG_INF)
    higher = tl.maximum(top, tl.max(x, 1))
    base = tl.where(higher == NEG_INF, 0.0, higher)
    total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((x - base[:, None]) * LOG2E), 1)
    return higher, total, plain


@triton.jit
def row_statistics(
    row, columns, vocab, SMOOTHING: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """(max, sum of exp(x - max), sum of x) over the columns below vocab. AGAIN: the row will be read once more."""
    HINT: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    lane = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    top = tl.full([BLOCK // VECTOR], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    plain = tl.zeros([BLOCK // VECTOR], tl.float32)
    whole = vocab // BLOCK * BLOCK
    ahead = tl.load(row + lane, mask=lane < columns, other=0.0, eviction_policy=HINT)
    for start in range(0, whole, BLOCK):
        x = ahead
        column = start + BLOCK + lane
        ahead = tl.load(row + column, mask=column < columns, other=0.0, eviction_policy=HINT)
        top, total, plain = _add_block(x, lane < vocab, top, total, plain, False, SMOOTHING)
    if whole < vocab:
        top, total, plain = _add_block(ahead, whole + lane < vocab, top, total, plain, True, SMOOTHING)
    highest = tl.max(top, 0)
    base = tl.where(highest == NEG_INF, 0.0, highest)
    total = tl.sum(total * tl.exp2((top - base) * LOG2E), 0)
    return highest, total, tl.sum(plain, 0)


@triton.jit
def _row_gradient(
    row, out, columns, vocab, target, target_logit, lse, scale, z_loss, smoothing, whole_vocab,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes scale * dloss/dlogits, 0 from vocab on, walking backwards. `out` may be `row`.

    Blocks below vocab need no mask. The target's own element, of logit `target_logit`, is written once more at the end:
    to look for it in every element would cost as much as the rest.
    """
    lane = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    factor = scale * (1.0 + 2.0 * z_loss * lse)
    shift = scale * smoothing / whole_vocab
    whole = vocab // BLOCK * BLOCK
    last = (columns - 1) // BLOCK * BLOCK
    ahead = tl.load(row + last + lane, mask=last + lane < columns, other=0.0, eviction_policy="evict_first")
    for behind in range(whole, columns, BLOCK):
        column = last - (behind - whole) + lane
        x = ahead.to(tl.float32)
        ahead = tl.load(row + column - BLOCK, mask=column >= BLOCK, other=0.0, eviction_policy="evict_first")
        grad = tl.exp2((x - lse) * LOG2E) * factor
        if SMOOTHING:
            grad -= shift
        grad = tl.where(column < vocab, grad, 0.0)
        tl.store(out + column, grad.to(out.dtype.element_ty), mask=column < columns, eviction_policy="evict_first")
    for behind in range(BLOCK, whole + BLOCK, BLOCK):
        column = whole - behind + lane
        x = ahead.to(tl.float32)
        ahead = tl.load(row + column - BLOCK, mask=column >= BLOCK, other=0.0, eviction_policy="evict_first")
        grad = tl.exp2((x - lse) * LOG2E) * factor
        if SMOOTHING:
            grad -= shift
        tl.store(out + column, grad.to(out.dtype.element_ty), eviction_policy="evict_first")
    grad = tl.exp2((target_logit - lse) * LOG2E) * factor
    if SMOOTHING:
        grad -= shift
    grad -= scale * (1.0 - smoothing)
    tl.debug_barrier()  # after whichever thread has written the target's element
    tl.store(out + target, grad.to(out.dtype.element_ty), mask=(target >= 0) & (target < vocab))


@triton.jit
def _row_zero(out, columns, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for start in range(0, columns, BLOCK):
        tl.store(out + start + lane, tl.zeros([BLOCK], out.dtype.element_ty), mask=start + lane < columns)


@triton.jit
def loss_of(highest, log_total, target_logit, plain, vocab, smoothing, z_loss, SMOOTHING: tl.constexpr):
    """From max and log(sum exp(x - max)) apart: their sum has lost the digits of the second where logits are large."""
    lse = highest + log_total
    loss = log_total + (highest - target_logit) + z_loss * lse * lse
    if SMOOTHING:
        loss += smoothing * (target_logit - plain / vocab)
    return loss


@triton.jit
def losses_kernel(
    logits, labels, dlosses, losses, lses, columns, vocab, stride, ignore_index, smoothing, z_loss,
    IN_PLACE: tl.constexpr, SCALED: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    label = tl.load(labels + index)
    if label == ignore_index:
        tl.store(losses + index, 0.0)
        if IN_PLACE:
            _row_zero(row, columns, BLOCK)
        else:
            tl.store(lses + index, 0.0)
    else:
        good = (label >= 0) & (label < vocab)
        target_logit = tl.load(row + label, mask=good, other=float("nan")).to(tl.float32)
        scale = 1.0
        if SCALED:
            scale = tl.load(dlosses + index).to(tl.float32)
        highest, total, plain = row_statistics(row, columns, vocab, SMOOTHING, IN_PLACE, BLOCK, VECTOR)
        log_total = tl.log(total)
        lse = highest + log_total
        tl.store(losses + index, loss_of(highest, log_total, target_logit, plain, vocab, smoothing, z_loss, SMOOTHING))
        if IN_PLACE:
            scale = tl.where(good, scale, float("nan"))
            tl.debug_barrier()  # all have read the row, and the target's logit, before any of it is written
            _row_gradient(
                row, row, columns, vocab, label, target_logit, lse, scale, z_loss, smoothing, vocab,
                SMOOTHING, BLOCK, VECTOR,
            )  # fmt: skip
        else:
            tl.store(lses + index, lse)


@triton.jit
def gradient_kernel(
    dlosses, logits, labels, lses, out, columns, vocab, whole_vocab, stride, stride_out, stride_dlosses, first,
    ignore_index, smoothing, z_loss,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + index)
    target = out + index * stride_out
    if label == ignore_index:
        _row_zero(target, columns, BLOCK)
    else:
        good = (label >= 0) & (label < whole_vocab)
        scale = tl.where(good, tl.load(dlosses + index * stride_dlosses).to(tl.float32), float("nan"))
        row = logits + index * stride
        column = label - first
        target_logit = tl.load(row + column, mask=(column >= 0) & (column < vocab), other=0.0).to(tl.float32)
        tl.debug_barrier()  # all have read the target's logit before any of the row is written
        _row_gradient(
            row, target, columns, vocab, column, target_logit, tl.load(lses + index), scale, z_loss, smoothing,
            whole_vocab, SMOOTHING, BLOCK, VECTOR,
        )  # fmt: skip


def policy(columns: int, element_size: int) -> tuple[int, int, int]:
    """(block, elements of one 16-byte load, warps): 16 elements a thread, more threads for longer rows.

    32 warps hold a multiprocessor alone: beyond 64 Ki columns two rows each would not leave room in L2 (see the
    header).
    """
    warps = 32 if columns > 65536 else 16 if columns > 16384 else 8 if columns > 4096 else 4
    return warps * 512, 16 // element_size, warps


def options(logits: Tensor, smoothing: float) -> dict[str, int | bool]:
    """What the kernels that walk over rows are compiled for."""
    block, vector, warps = policy(logits.shape[1], logits.element_size())
    return {"SMOOTHING": smoothing != 0.0, "BLOCK": block, "VECTOR": vector, "num_warps": warps}


def rows_of(logits: Tensor) -> Tensor:
    """The logits with the elements of a row next to each other."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, vocab: int
) -> tuple[Tensor, Tensor]:
    """(losses, lse) [T] fp32, both 0 where ignored; the logits are read once."""
    logits = rows_of(logits)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lses = torch.empty_like(losses)
    if losses.numel():
        losses_kernel[(losses.numel(),)](
            logits, labels.contiguous(), losses, losses, lses, logits.shape[1], vocab, logits.stride(0), ignore_index,
            label_smoothing, z_loss, IN_PLACE=False, SCALED=False, **options(logits, label_smoothing),
        )  # fmt: skip
    return losses, lses


def forward_in_place(
    logits: Tensor,
    labels: Tensor,
    dlosses: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab: int,
) -> Tensor:
    """Losses [T] fp32; the logits become dloss/dlogits, times `dlosses` row by row if given, 0 from vocab on.

    Rows may be further apart than they are long. ValueError unless the elements of a row are next to each other.
    """
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"cross_entropy_: a row's elements must be adjacent; the strides are {logits.stride()}")
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if losses.numel():
        losses_kernel[(losses.numel(),)](
            logits, labels.contiguous(), losses if dlosses is None else dlosses.contiguous(), losses, losses,
            logits.shape[1], vocab, logits.stride(0), ignore_index, label_smoothing, z_loss,
            IN_PLACE=True, SCALED=dlosses is not None, **options(logits, label_smoothing),
        )  # fmt: skip
    return losses


def gradient(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab: int,
    *,
    in_place: bool = False,
    first: int = 0,
    whole_vocab: int | None = None,
) -> Tensor:
    """dlosses * dloss/dlogits given each row's lse: new, or `in_place` of the logits. `dlosses` is [T] or 0-dim.

    With the vocabulary cut over ranks, column 0 is token `first`, `vocab` counts the local columns that exist and
    `whole_vocab` those of all ranks.
    """
    logits = logits if in_place else rows_of(logits)
    out = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel():
        dlosses = dlosses if dlosses.dim() == 0 else dlosses.contiguous()
        gradient_kernel[(logits.shape[0],)](
            dlosses, logits, labels.contiguous(), lse.contiguous(), out, logits.shape[1], vocab,
            vocab if whole_vocab is None else whole_vocab, logits.stride(0), out.stride(0), min(dlosses.dim(), 1),
            first, ignore_index, label_smoothing, z_loss, **options(logits, label_smoothing),
        )  # fmt: skip
    return out
