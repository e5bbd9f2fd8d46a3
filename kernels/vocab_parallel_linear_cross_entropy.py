"""The last linear layer and its cross-entropy where the weight's rows, the vocabulary, lie in shards over R ranks.

    logits_r = x W_r^T                                     rows first .. first + V/R of W; x is the same on all ranks
    losses   = merge(gather(local(logits_r)))              the halves of vocab_parallel.py about one collective
    dx_r     = dlogits_r W_r;   dW_r = dlogits_r^T x       chunk by chunk, as in linear_cross_entropy.py

The loss and the losses are those of whole rows, the same bits on every rank; dW_r is the whole gradient of the shard.
dx_r is this rank's share: the gradient of x is the sum of all R, and whatever made x adds them up: where x
was whole on every rank, by an all-reduce in the backward of an identity before this op; where x was all-gathered from
shards of the sequence, by the reduce-scatter that is the backward of that gather.

Shapes   x [T, H]; weight [V/R, H]; labels [T] int64, of the whole vocabulary. Every shard has as many rows, so that all
         ranks cut T into the same chunks. Rows from `vocab` of the whole weight on are padding: no logits, and a
         gradient of 0; a shard may hold nothing else.
FLOPs    6 T H V/R with gradients, 2 T H V/R without.
Memory   as linear_cross_entropy.py: one chunk of logits, of MAX_LOGITS elements.
Bytes    as linear_cross_entropy.py, and one more read of the logits: their gradient cannot follow while a row is in
         cache. The collectives carry 12 T bytes from each rank to each other, 16 T with label smoothing.
Floor    products: 6 T H V/R / product rate.
Measured bf16 T 2048, H 768, V 50304, one shard, all gradients: 1,404 ms, linear_cross_entropy 1,410 ms in the same run
         (medians 1,472 and 1,447); without gradients 436 and 436 ms. AMD EPYC (Zen 4, AVX-512 bf16), two threads,
         torch 2.13, minimum of 25, 2026-11-21.
         Triton: not yet run on a GPU.

A chunk's rows are taken in two parts whose statistics travel one after the other: while the first's do, the second's
are found; while the second's do, the first's gradient is made. That hides milliseconds at no cost. To hide them behind
the next chunk's product instead takes two chunks of half the size, whose further reads of W and dW cost 5%.

An op of torch.library cannot take a Python function such as `gather`, so the loop over chunks is an autograd.Function
around registered ops. torch.compile looks through it and unrolls the chunks; `gather` must be something it can trace.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import vocab_parallel
from .cross_entropy import check_labels
from .gradient_sink import sink_of
from .linear_cross_entropy import MAX_LOGITS, check_promise, in_chunks
from .precision import wide


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """Its result."""
        ...


Gather = Callable[[Tensor], Tensor | Pending]
"""All-gathers [t, K] to [R, t, K] in order of the ranks; other work is done before what it returns is waited for. It is
called twice for each chunk of rows, once where there is only one row, in the same order on every rank:

    def gather(stats):
        out = stats.new_empty(ranks, *stats.shape)
        work = dist.all_gather_into_tensor(out.flatten(0, 1), stats, group, async_op=True)
        return Arriving(work, out)    # its wait() waits for work and returns out
"""


class Halves(NamedTuple):
    """The functions of vocab_parallel.py, or others with their arguments and results."""

    local: Callable[..., Tensor]
    merge: Callable[..., tuple[Tensor, Tensor]]
    gradient_: Callable[..., object]


REGISTERED = Halves(vocab_parallel.local, vocab_parallel.merge, vocab_parallel.gradient_)


class _Shard(NamedTuple):
    """What the cross-entropy of a chunk depends on beside its logits and labels."""

    halves: Halves
    gather: Gather
    vocab_start: int
    vocab: int
    ignore_index: int
    label_smoothing: float
    z_loss: float


def reference(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    gather: Gather,
    vocab_start: int,
    vocab: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    upstream: Tensor | None = None,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch with whole fp32 logits of the shard, the definition of correct. The sum of all losses, 0-dim fp32.

    The weight's first row is row `vocab_start` of the whole, of which `vocab` rows exist. `return_losses` gives
    (sum, losses [T]), where the losses have no gradient. `upstream` as in linear_cross_entropy. ValueError when shapes
    disagree, when vocab_start is no multiple of the shard's rows, when what `gather` brings is not [R, T, 3] (4 with
    label smoothing) or R shards hold less than `vocab` rows, or (on the CPU) when a label is outside [0, vocab).
    """
    _check(x_TH, weight_VH, labels_T, vocab_start, vocab)
    shard = _Shard(REGISTERED, gather, vocab_start, vocab, ignore_index, label_smoothing, z_loss)
    with torch.autocast(x_TH.device.type, enabled=False):
        logits = x_TH.to(wide(x_TH.dtype)) @ weight_VH.to(wide(x_TH.dtype)).T
        losses: Tensor = _ReferenceLosses.apply(logits, labels_T, shard)
    return (losses.sum(), losses.detach()) if return_losses else losses.sum()


def chunked(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    gather: Gather,
    vocab_start: int,
    vocab: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    upstream: Tensor | None = None,
    return_losses: bool = False,
    halves: Halves = REGISTERED,
) -> Tensor | tuple[Tensor, Tensor]:
    """A chunk of logits at a time, rounded to the dtype of x. As `reference`.

    The weight is taken in the dtype of x (autocast). Gradients are computed only for inputs that require them. Where
    `upstream` is given and the weight has a sink (gradient_sink.py), dW goes straight into it, during the forward.
    `halves` are what the cross-entropy of a chunk is made of.
    """
    _check(x_TH, weight_VH, labels_T, vocab_start, vocab)
    shard = _Shard(halves, gather, vocab_start, vocab, ignore_index, label_smoothing, z_loss)
    weight, needs = weight_VH.to(x_TH.dtype), torch.is_grad_enabled()
    promised = upstream is not None and weight is weight_VH and sink_of(weight) is not None
    loss, losses = _Chunked.apply(
        x_TH,
        weight,
        labels_T,
        upstream if promised else None,
        needs and x_TH.requires_grad,
        needs and weight.requires_grad,
        shard,
    )
    return (loss, losses) if return_losses else loss


def _check(x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, vocab_start: int, vocab: int) -> None:
    op = "vocab_parallel_linear_cross_entropy"
    if x_TH.dim() != 2 or weight_VH.dim() != 2 or x_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"{op}: need x [T, H] and weight [V/R, H]; they are {tuple(x_TH.shape)} and {tuple(weight_VH.shape)}"
        )
    if labels_T.shape != x_TH.shape[:1]:
        raise ValueError(f"{op}: labels are {tuple(labels_T.shape)}; x {tuple(x_TH.shape)} needs [{x_TH.shape[0]}]")
    rows = weight_VH.shape[0]
    if rows < 1 or vocab_start < 0 or vocab_start % rows or vocab < 1:
        raise ValueError(
            f"{op}: a shard of {rows} rows from row {vocab_start} on of {vocab}; every rank needs as many rows, and "
            "rank r those from r * rows on: pad the whole weight to a multiple of the ranks"
        )


# What both forms share: the cross-entropy of some rows of this shard's logits.


def _of_shard(shard: _Shard, logits: Tensor, labels: Tensor, dlosses: Tensor | None, gradient: bool) -> Tensor:
    """A chunk's losses, and its gradient in place (linear_cross_entropy.CrossEntropy): in two parts.

    The second's statistics are found while the first's travel, and the first's gradient is made while the second's do.
    """
    rows = max(-(-len(logits) // 2), 1)
    parts = [slice(start, start + rows) for start in range(0, len(logits), rows)]
    columns, smoothing = (shard.vocab_start, shard.vocab, shard.ignore_index), shard.label_smoothing
    pending = [shard.gather(shard.halves.local(logits[part], labels[part], *columns, smoothing)) for part in parts]
    found = []
    for part, stats in zip(parts, pending, strict=True):
        losses, lse = _merge(shard, stats, labels[part], logits.shape[1])
        found.append(losses)
        if gradient:
            weights = None if dlosses is None else dlosses[part]
            shard.halves.gradient_(logits[part], labels[part], lse, weights, *columns, smoothing, shard.z_loss)
    return torch.cat(found)


def _merge(shard: _Shard, pending: Tensor | Pending, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    halves, _, _, vocab, ignore_index, label_smoothing, z_loss = shard
    stats_RTK = pending if isinstance(pending, Tensor) else pending.wait()
    if stats_RTK.shape[0] * rows < vocab:
        raise ValueError(
            f"vocab_parallel_linear_cross_entropy: gather brings the statistics of {stats_RTK.shape[0]} shards; with "
            f"{rows} rows each they hold less than the vocabulary of {vocab}"
        )
    return halves.merge(stats_RTK, labels, vocab, ignore_index, label_smoothing, z_loss)


class _Chunked(torch.autograd.Function):
    """(loss, losses), with all gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        upstream: Tensor | None,
        need_dx: bool,
        need_dweight: bool,
        shard: _Shard,
    ) -> tuple[Tensor, Tensor]:
        check_labels(labels, shard.ignore_index, shard.vocab)
        accumulate = False
        dx = x.new_empty(x.shape) if need_dx else None
        if upstream is not None:
            dweight, accumulate = weight.gradient_sink()  # type: ignore[attr-defined]
        else:
            dweight = x.new_empty(weight.shape, dtype=wide(x.dtype)) if need_dweight else None
        of_chunk, most = partial(_of_shard, shard), MAX_LOGITS[x.device.type]
        losses = in_chunks(x, weight, labels, upstream, of_chunk, most, dx, dweight, accumulate)
        if upstream is not None:
            weight.gradient_sink.written()  # type: ignore[attr-defined]
        ctx.needs, ctx.weight_dtype = (need_dx, need_dweight and upstream is None), weight.dtype
        ctx.mark_non_differentiable(losses)
        nothing = losses.new_empty(0)
        ctx.save_for_backward(x.new_empty(0) if dx is None else dx, dweight if ctx.needs[1] else nothing, upstream)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dweight, upstream = ctx.saved_tensors
        if upstream is None:
            dx, dweight = torch.ops.megapre.linear_cross_entropy_backward(dloss, dx, dweight, ctx.weight_dtype)
        else:
            check_promise(dloss, upstream)
        return dx if ctx.needs[0] else None, dweight if ctx.needs[1] else None, *(None,) * 5


class _ReferenceLosses(torch.autograd.Function):
    """The losses of a shard's logits, and the gradient of these logits, from the definitions in vocab_parallel.py."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: _Shard) -> Tensor:
        smoothed = shard.label_smoothing != 0
        stats = vocab_parallel.local_reference(
            logits, labels, shard.vocab_start, shard.vocab, shard.ignore_index, smoothed
        )
        losses, lse = _merge(shard, shard.gather(stats), labels, logits.shape[1])
        ctx.save_for_backward(logits, labels, lse)
        ctx.shard = shard
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, lse = ctx.saved_tensors
        dlogits = logits.clone()
        vocab_parallel.gradient_reference_(dlogits, labels, lse, dlosses, *ctx.shard[2:])
        return dlogits, None, None
