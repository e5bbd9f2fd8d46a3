"""What tests of cross-entropy share: logits and labels, torch's own losses and gradients, and our ops' three ways."""

from typing import Any

import torch
from rule import close
from torch import Tensor
from torch.nn import functional as F

from megapre.kernels import vocab_parallel

IGNORE = -100


def drawn(
    rows: int, width: int, vocab: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits whose columns from `vocab` on are NaN, and labels of which about every fifth is ignored."""
    generator = torch.Generator().manual_seed(seed + rows * 100_003 + vocab)
    logits = (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)
    logits[:, vocab:] = torch.nan
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    return logits, labels


def drawn_for_shards(rows: int, widths: list[int], vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `drawn`, with six of ten labels at the borders of shards of these widths."""
    logits, labels = drawn(rows, sum(widths), vocab, dtype)
    generator = torch.Generator().manual_seed(rows + sum(widths))
    borders = {sum(widths[:rank]) + side for rank in range(len(widths) + 1) for side in (-1, 0)}
    known = torch.tensor(sorted(border for border in borders if 0 <= border < vocab))
    moved = (torch.rand(rows, generator=generator) < 0.6) & (labels != IGNORE)
    return logits, torch.where(moved, known[torch.randint(len(known), (rows,), generator=generator)], labels)


def cut(logits: Tensor, widths: list[int]) -> list[Tensor]:
    """Contiguous copies of shards of these widths."""
    return [shard.clone(memory_format=torch.contiguous_format) for shard in logits.split(widths, 1)]


def own(logits: Tensor, labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor) -> list[Tensor]:
    """Losses and gradient of torch's own cross_entropy, which needs 16-bit logits in fp32 to give fp32 losses."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    leaf = logits.clone().requires_grad_()
    exist = leaf[:, :vocab].to(wide)
    losses = F.cross_entropy(exist, labels, ignore_index=IGNORE, label_smoothing=smoothing, reduction="none")
    if z_loss:
        losses = losses + (z_loss * exist.logsumexp(1).square()).where(labels != IGNORE, 0.0)
    (gradient,) = torch.autograd.grad(losses, leaf, dlosses.to(wide))
    return [losses.detach(), gradient]


# The ways take torch.ops.megapre or what has its ops, logits, labels, vocab, smoothing, z_loss and dlosses or None.


def in_two(
    ops: Any, logits: Tensor, labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor | None
) -> list[Tensor]:
    """Losses and gradient by the separate ops."""
    settings = (IGNORE, smoothing, z_loss, vocab)
    losses, lse = ops.cross_entropy(logits, labels, *settings)
    ones = torch.ones_like(losses) if dlosses is None else dlosses
    return [losses, ops.cross_entropy_backward(ones, logits, labels, lse, *settings)]


def in_place(
    ops: Any, logits: Tensor, labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor | None
) -> list[Tensor]:
    """Losses, and the logits, which are overwritten."""
    return [ops.cross_entropy_(logits, labels, dlosses, IGNORE, smoothing, z_loss, vocab), logits]


def in_shards(
    ops: Any, shards: list[Tensor], labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor | None
) -> list[Tensor]:
    """Losses, and the joined gradient of shards, which are overwritten."""
    starts = [sum(s.shape[1] for s in shards[:rank]) for rank in range(len(shards))]
    stats = [
        ops.cross_entropy_local(s, labels, start, vocab, IGNORE, smoothing != 0)
        for s, start in zip(shards, starts, strict=True)
    ]
    losses, lse = vocab_parallel.merge(torch.stack(stats), labels, vocab, IGNORE, smoothing, z_loss)
    for shard, start in zip(shards, starts, strict=True):
        ops.cross_entropy_local_backward_(shard, labels, lse, dlosses, start, vocab, IGNORE, smoothing, z_loss)
    return [losses, torch.cat(shards, 1)]


def all_ways(
    ops: Any, logits: Tensor, labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor | None
) -> list[list[Tensor]]:
    """Losses and gradient of each way; shards are two, of which the first has a third of the columns."""
    terms = (labels, vocab, smoothing, z_loss, dlosses)
    first = logits.shape[1] // 3
    return [
        in_two(ops, logits, *terms),
        in_place(ops, logits.clone(memory_format=torch.contiguous_format), *terms),
        in_shards(ops, cut(logits, [first, logits.shape[1] - first]), *terms),
    ]


def obeys(
    got: list[Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab: int,
    smoothing: float,
    z_loss: float,
    dlosses: Tensor | None,
) -> None:
    """Asserts the rule for losses and gradient; zeros for ignored rows and padded columns."""
    upstream = torch.ones(len(labels)) if dlosses is None else dlosses
    torchs = own(logits, labels, vocab, smoothing, z_loss, upstream)
    exact = own(logits.double(), labels, vocab, smoothing, z_loss, upstream)
    assert (got[0].dtype, got[1].dtype) == (torchs[0].dtype, logits.dtype)
    assert not got[1][:, vocab:].any()
    assert not got[0][labels == IGNORE].any() and not got[1][labels == IGNORE].any()
    for what, g, t, e in zip(("losses", "gradient"), got, torchs, exact, strict=True):
        close(g[..., :vocab], t[..., :vocab], e[..., :vocab], what)
