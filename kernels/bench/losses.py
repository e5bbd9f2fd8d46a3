"""The cross-entropies, of logits and with the last layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import registry
from ..cost import cost
from .case import DTYPES, IGNORE, Case, Function, Sizes, liger_function, randn, refill, take, twice


def _logits(sizes: Sizes, dtype: str, device: str) -> tuple[dict[str, int], Tensor, Tensor, int]:
    """Sizes, logits, labels, and the columns that exist: `pad` of V do not."""
    sizes = take(sizes, "T", "V", pad=0)
    vocab = sizes["V"] - sizes.get("pad", 0)
    labels = torch.randint(0, vocab, (sizes["T"],), device=device)
    return sizes, randn((sizes["T"], sizes["V"]), dtype, device, scale=2.0), labels, vocab


def cross_entropy(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes, logits, labels, vocab = _logits(sizes, dtype, device)

    def adapt(function: Function) -> Function:
        return lambda x: function(x, labels, vocab=vocab)

    def own(x: Tensor) -> Tensor:
        return F.cross_entropy(x[:, :vocab], labels, reduction="none")

    upstream = [torch.full((sizes["T"],), 1.0 / sizes["T"], device=device)]
    work = twice("cross_entropy", sizes, dtype)
    return Case(
        "cross_entropy", sizes, dtype, device, "copy", work, adapt, lambda wrap: wrap(own), [logits], upstream,
    )  # fmt: skip


def cross_entropy_(sizes: Sizes, dtype: str, device: str) -> Case:
    """Losses, and the gradient in the place of the logits; the peers make it as a second tensor."""
    sizes, fresh, labels, vocab = _logits(sizes, dtype, device)
    logits = fresh.clone()

    def adapt(function: Function) -> Function:
        return lambda: [function(logits, labels, None, IGNORE, 0.0, 0.0, vocab), logits]

    def through(loss: Function) -> Function:
        def step() -> list[Tensor]:
            leaf = fresh.detach().requires_grad_()
            losses = loss(leaf)
            losses = losses[0] if isinstance(losses, tuple) else losses
            return [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]

        return step

    def own(x: Tensor) -> Tensor:
        return F.cross_entropy(x[:, :vocab], labels, reduction="none")

    flops = cost("cross_entropy", sizes, dtype)[0] + cost("cross_entropy_backward", sizes, dtype)[0]
    work = {"step": (flops, cost("cross_entropy_backward", sizes, dtype)[1])}
    return Case(
        "cross_entropy_", sizes, dtype, device, "copy", work, adapt, lambda wrap: through(wrap(own)),
        prepare=refill([logits], [fresh]),
    )  # fmt: skip


def linear_cross_entropy(sizes: Sizes, dtype: str, device: str) -> Case:
    """Backward alone is no mode of it: the gradients are made in the forward pass."""
    sizes = take(sizes, "T", "H", "V")
    rows, width, vocab = sizes["T"], sizes["H"], sizes["V"]
    leaves = [randn((rows, width), dtype, device), randn((vocab, width), dtype, device, scale=width**-0.5)]
    labels = torch.randint(0, vocab, (rows,), device=device)

    def adapt(function: Function) -> Function:
        return lambda x, weight: function(x, weight, labels)

    def own(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).float(), labels, reduction="sum")

    peers: dict[str, Function] = {}
    if liger := liger_function(device, "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"):

        def through_liger(x: Tensor, weight: Tensor) -> Tensor:
            loss = liger.apply(x, weight, labels, None, None, IGNORE, 0.0, 0.0, "sum")
            return loss[0] if isinstance(loss, tuple) else loss  # type: ignore[no-any-return]

        peers["liger"] = through_liger
    upstream = [torch.tensor(1.0 / rows, device=device)]
    work = twice("linear_cross_entropy", sizes, dtype)
    del work["backward"]
    return Case(
        "linear_cross_entropy", sizes, dtype, device, "product", work, adapt, lambda wrap: wrap(own), leaves, upstream,
        peers,
    )  # fmt: skip


def vocab_parallel_linear_cross_entropy(sizes: Sizes, dtype: str, device: str) -> Case:
    """One shard that holds all of V, to be compared with `unsharded`: linear_cross_entropy as it is in use."""
    whole = linear_cross_entropy(sizes, dtype, device)
    vocab = whole.sizes["V"]
    labels = torch.randint(0, vocab, (whole.sizes["T"],), device=device)

    def adapt(function: Function) -> Function:
        return lambda x, weight: function(x, weight, labels, lambda stats: stats.unsqueeze(0), 0, vocab)

    unsharded = registry.choose(device, None, DTYPES[dtype]).linear_cross_entropy
    peers: dict[str, Function] = {"unsharded": lambda x, weight: unsharded(x, weight, labels)}
    work = twice("vocab_parallel_linear_cross_entropy", whole.sizes, dtype)
    del work["backward"]
    return Case(
        "vocab_parallel_linear_cross_entropy", whole.sizes, dtype, device, "product", work, adapt, None, whole.leaves,
        whole.upstream, peers,
    )  # fmt: skip
