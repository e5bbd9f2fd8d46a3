"""Cross-entropy of logits whose columns lie in shards: two halves, and one collective of three numbers a row between.

    stats  = local(logits, labels, vocab_start, vocab)            each of R ranks, on its columns
    stats_R = the caller's all-gather of stats                    [R, T, 3]; [R, T, 4] with label smoothing
    losses, lse = merge(stats_R, labels, vocab)                   every rank, the same bits
    gradient_(logits, labels, lse, dlosses, vocab_start, vocab)   each rank, over its logits

A shard's statistics of a row are its maximum m_r, s_r = sum_j exp(x_j - m_r), the label's logit (0 where the label is
elsewhere) and, for label smoothing, sum_j x_j. With M = max_r m_r

    lse = M + log sum_r s_r exp(m_r - M)                                              (Milakov & Gimelshein 2018, eq. 4)

and with lse the loss and the gradient are those of cross_entropy.py, where ignore_index, label_smoothing, z_loss, NaN
and infinities are explained: they behave here as there.

Shapes   logits [T, V_r], column 0 being column vocab_start of the whole row; labels [T] int64, of the whole vocabulary;
         stats, losses, lse fp32 (fp64 for fp64 logits). Columns from `vocab` of the whole row on do not exist: their
         gradient is 0, and a shard may hold nothing else. Shards may be of any widths; together they hold columns
         0 .. vocab - 1 once each.
FLOPs    about 5 a logit and 4 in the gradient; R * T in the merge.
Bytes    one read of the logits; one read and one write of them in the gradient.
Floor    memory: bytes / copy rate.
Measured bf16 1024 x 50304, one shard: local 8.4 ms, gradient 10.1 ms; a copy of the logits 5.4 ms.
         AMD EPYC (Zen 4, AVX-512 bf16), two threads, torch 2.13, minimum of 8, 2026-11-21.
         CUDA C++, and Triton in its present form: not yet run on a GPU.

Nothing here is differentiable by autograd: the halves are what a tensor-parallel loss calls in its own forward and
backward. No function communicates.
"""

import torch
from torch import Tensor

from . import library
from .cross_entropy import check_labels
from .precision import wide


def local(
    logits_TV: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    vocab: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Statistics of a shard's columns, [T, 3], or [T, 4] with label smoothing; 0 in ignored rows, which are not read.

    `vocab` counts the columns of the whole row. ValueError when shapes disagree, vocab_start < 0, vocab < 1, or (on
    the CPU) a label is outside [0, vocab).
    """
    return torch.ops.megapre.cross_entropy_local(  # type: ignore[no-any-return]
        logits_TV, labels_T, vocab_start, vocab, ignore_index, label_smoothing != 0
    )


def merge(
    stats_RTK: Tensor,
    labels_T: Tensor,
    vocab: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(losses [T], lse [T]) of the whole rows, 0 where ignored, from the statistics of all shards.

    ValueError when the statistics do not fit the labels, or lack the fourth number that label smoothing needs.
    """
    check_merge(stats_RTK, labels_T, label_smoothing)
    top_RT, sum_RT, at_label_RT = stats_RTK.unbind(-1)[:3]
    top = top_RT.amax(0)
    # Where all is -inf the difference would be NaN.
    total = (sum_RT * torch.exp(top_RT - top).masked_fill(top_RT == top, 1.0)).sum(0)
    log_sum = total.log()
    lse = top + log_sum
    losses = (top - at_label_RT.sum(0)) + log_sum
    if label_smoothing:
        mean = stats_RTK[..., 3].sum(0) / vocab
        losses = (1.0 - label_smoothing) * losses + label_smoothing * (lse - mean)
    if z_loss:
        losses = losses + z_loss * lse.square()
    valid = labels_T != ignore_index
    return losses.where(valid, 0.0), lse.where(valid, 0.0)


def check_merge(stats_RTK: Tensor, labels_T: Tensor, label_smoothing: float) -> None:
    """ValueError as `merge`."""
    wanted = 4 if label_smoothing else 3
    if stats_RTK.dim() != 3 or stats_RTK.shape[0] < 1 or stats_RTK.shape[1:] != (labels_T.shape[0], wanted):
        raise ValueError(
            f"vocab_parallel.merge: stats are {tuple(stats_RTK.shape)}; [ranks, {labels_T.shape[0]}, {wanted}] is "
            f"needed for {labels_T.shape[0]} labels and label_smoothing {label_smoothing}"
        )


def gradient_(
    logits_TV: Tensor,
    labels_T: Tensor,
    lse_T: Tensor,
    dlosses_T: Tensor | None,
    vocab_start: int,
    vocab: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Overwrites a shard's logits with the gradient of sum(dlosses * losses) to them and returns them.

    dlosses None means 1 for every row. ValueError as `local`, and unless every row's elements are neighbours.
    """
    torch.ops.megapre.cross_entropy_local_backward_(
        logits_TV, labels_T, lse_T, dlosses_T, vocab_start, vocab, ignore_index, label_smoothing, z_loss
    )
    return logits_TV


# The registered ops: kernels in plain torch, fake tensors.


def local_reference(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab: int, ignore_index: int, label_smoothing: bool
) -> Tensor:
    """Plain torch, the definition of correct."""
    columns = columns_here(logits, vocab_start, vocab)
    check_labels(labels, ignore_index, vocab)
    x = logits[:, :columns].to(wide(logits.dtype))
    top = x.amax(-1) if columns else x.new_full(labels.shape, -torch.inf)
    total = (x - top.masked_fill(top == -torch.inf, 0.0).unsqueeze(1)).exp().sum(-1)
    stats = [top, total, _at_label(x, labels - vocab_start)]
    if label_smoothing:
        stats.append(x.sum(-1))
    return torch.stack(stats, -1).where((labels != ignore_index).unsqueeze(1), 0.0)


def gradient_reference_(
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
    """Plain torch, the definition of correct."""
    columns = columns_here(logits, vocab_start, vocab)
    check_labels(labels, ignore_index, vocab)
    gradient = torch.sub(logits[:, :columns], lse.unsqueeze(1)).exp() * (1.0 + 2.0 * z_loss * lse).unsqueeze(1)
    gradient = gradient - label_smoothing / vocab
    column = torch.arange(columns, device=labels.device)
    gradient = gradient - (1.0 - label_smoothing) * (column == (labels - vocab_start).unsqueeze(1))
    valid = (labels != ignore_index).unsqueeze(1)
    if dlosses is not None:
        gradient = gradient * dlosses.to(lse.dtype).unsqueeze(1)
    # where, not a product with 0: an ignored row may hold inf or NaN.
    logits[:, :columns] = gradient.where(valid, 0.0).to(logits.dtype)
    logits[:, columns:] = 0


def columns_here(logits: Tensor, vocab_start: int, vocab: int) -> int:
    """How many columns of the shard exist. ValueError as `local`."""
    if vocab_start < 0 or vocab < 1:
        raise ValueError(
            f"vocab_parallel: a shard from column {vocab_start} on of {vocab} columns; vocab_start >= 0 and vocab >= 1 "
            "are needed"
        )
    return min(max(vocab - vocab_start, 0), logits.shape[1])


def _at_label(x: Tensor, column: Tensor) -> Tensor:
    if not x.shape[1]:
        return x.new_zeros(column.shape)
    here = (column >= 0) & (column < x.shape[1])
    return x.gather(1, column.where(here, 0).unsqueeze(1)).squeeze(1).where(here, 0.0)


def _fake_local(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab: int, ignore_index: int, label_smoothing: bool
) -> Tensor:
    return logits.new_empty(logits.shape[0], 4 if label_smoothing else 3, dtype=wide(logits.dtype))


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::cross_entropy_local` and its gradient."""
    shard = "int vocab_start, int vocab, int ignore_index"
    library.add(
        ops,
        f"cross_entropy_local(Tensor logits, Tensor labels, {shard}, bool label_smoothing) -> Tensor stats",
        local_reference,
        _fake_local,
    )
    library.add(
        ops,
        "cross_entropy_local_backward_(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor? dlosses, "
        f"{shard}, float label_smoothing, float z_loss) -> ()",
        gradient_reference_,
        lambda *_: None,
    )
