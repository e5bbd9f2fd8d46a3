# mypy: allow-untyped-defs, allow-incomplete-defs
"""Cross-entropy of logits whose columns lie in shards: the halves of kernels/vocab_parallel.py.

Bytes    `local` one read of the logits, `gradient_` one read and one write; the merge 12 or 16 a row and rank.
Floor    3 * bytes of the logits / copy rate.
Measured not yet run on a GPU in this form. An older one, of more instructions and with statistics as [3, T], took
         1.69 ms for all three on an 8192 x 131072 bf16 shard, 88% of the rate of a copy (kernels_nvidia-h200_2026-11-20
         in benchmarks/results).

A label outside [0, vocab) that is not ignore_index gives a NaN loss and a NaN gradient row, and reads nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..vocab_parallel import check_merge, columns_here
from .cross_entropy import LOG2E, NEG_INF, gradient, loss_of, options, row_statistics, rows_of
from .launch import ceil_div


@triton.jit
def statistics_kernel(
    logits, labels, statistics, columns, vocab, stride, first, ignore_index,
    SMOOTHING: tl.constexpr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    out = statistics + index * NUMBERS
    label = tl.load(labels + index)
    if label == ignore_index:
        for number in range(0, NUMBERS):
            tl.store(out + number, 0.0)
    else:
        row = logits + index * stride
        column = label - first
        target_logit = tl.load(row + column, mask=(column >= 0) & (column < vocab), other=0.0).to(tl.float32)
        highest, total, plain = row_statistics(row, columns, vocab, SMOOTHING, False, BLOCK, VECTOR)
        tl.store(out, highest)
        tl.store(out + 1, total)
        tl.store(out + 2, target_logit)
        if SMOOTHING:
            tl.store(out + 3, plain)


@triton.jit
def merge_kernel(
    statistics, labels, losses, lses, ranks, rows, vocab, ignore_index, smoothing, z_loss,
    SMOOTHING: tl.constexpr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows
    label = tl.load(labels + index, mask=inside, other=0)
    own = statistics + index.to(tl.int64) * NUMBERS
    apart = tl.cast(rows, tl.int64) * NUMBERS
    highest = tl.full([BLOCK], NEG_INF, tl.float32)
    for rank in range(0, ranks):
        highest = tl.maximum(highest, tl.load(own + rank * apart, mask=inside, other=0.0))
    base = tl.where(highest == NEG_INF, 0.0, highest)
    total = tl.zeros([BLOCK], tl.float32)
    target_logit = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for rank in range(0, ranks):
        part = own + rank * apart
        shift = tl.load(part, mask=inside, other=0.0) - base
        total += tl.load(part + 1, mask=inside, other=1.0) * tl.exp2(shift * LOG2E)
        target_logit += tl.load(part + 2, mask=inside, other=0.0)
        if SMOOTHING:
            plain += tl.load(part + 3, mask=inside, other=0.0)
    log_total = tl.log(total)
    lse = highest + log_total
    loss = loss_of(highest, log_total, target_logit, plain, vocab, smoothing, z_loss, SMOOTHING)
    bad = (label < 0) | (label >= vocab)
    loss = tl.where(bad, float("nan"), loss)
    ignored = label == ignore_index
    tl.store(losses + index, tl.where(ignored, 0.0, loss), mask=inside)
    tl.store(lses + index, tl.where(ignored, 0.0, lse), mask=inside)


def local(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab: int, ignore_index: int, label_smoothing: bool
) -> Tensor:
    """As `kernels.vocab_parallel.local_reference`, in fp32."""
    columns = columns_here(logits, vocab_start, vocab)
    logits = rows_of(logits)
    numbers = 4 if label_smoothing else 3
    out = torch.empty(logits.shape[0], numbers, dtype=torch.float32, device=logits.device)
    if out.numel():
        statistics_kernel[(logits.shape[0],)](
            logits, labels.contiguous(), out, logits.shape[1], columns, logits.stride(0), vocab_start, ignore_index,
            NUMBERS=numbers, **options(logits, float(label_smoothing)),
        )  # fmt: skip
    return out


def merge(
    stats: Tensor, labels: Tensor, vocab: int, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.vocab_parallel.merge`, from fp32 statistics. Ranks are added in order."""
    check_merge(stats, labels, label_smoothing)
    ranks, rows, numbers = stats.shape
    losses = torch.empty(rows, dtype=torch.float32, device=stats.device)
    lses = torch.empty_like(losses)
    if rows:
        merge_kernel[(ceil_div(rows, 256),)](
            stats.contiguous(), labels.contiguous(), losses, lses, ranks, rows, vocab, ignore_index,
            label_smoothing, z_loss, SMOOTHING=label_smoothing != 0.0, NUMBERS=numbers, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return losses, lses


def gradient_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    dlosses: Tensor | None,
    vocab_start: int,
    vocab: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """As `kernels.vocab_parallel.gradient_`."""
    columns = columns_here(logits, vocab_start, vocab)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"vocab_parallel: a row's elements must be adjacent; the strides are {logits.stride()}")
    gradient(
        torch.ones((), device=logits.device) if dlosses is None else dlosses, logits, labels, lse, ignore_index,
        label_smoothing, z_loss, columns, in_place=True, first=vocab_start, whole_vocab=vocab,
    )  # fmt: skip
