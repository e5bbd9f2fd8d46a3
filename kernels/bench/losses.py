"""The cross-entropies, of logits and with the last layer."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import registry
from ..cost import cost
from .case import DTYPES, IGNORE, Case, Function, Sizes, liger_function, randn, refill, take, twice
from .exact import ends, wider

CHUNK = 1024  # rows whose exact logits are held at once
SOME = 256  # rows of the weight's gradient that are compared


def _logits(sizes: Sizes, dtype: str, device: str) -> tuple[dict[str, int], Tensor, Tensor, int]:
    """Sizes, logits, labels, and the columns that exist: `pad` of V do not."""
    sizes = take(sizes, "T", "V", pad=0)
    vocab = sizes["V"] - sizes.get("pad", 0)
    labels = torch.randint(0, vocab, (sizes["T"],), device=device)
    return sizes, randn((sizes["T"], sizes["V"]), dtype, device, scale=2.0), labels, vocab


def _exact(logits: Tensor, labels: Tensor, vocab: int, factor: float, dtype: str) -> list[Tensor]:
    """The sum of all losses, and the gradient of the rows at both ends."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, at in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        total += F.cross_entropy(rows[:, :vocab].to(wider(dtype)), at, reduction="sum")
    leaf = ends(logits).to(wider(dtype)).requires_grad_()
    losses = F.cross_entropy(leaf[:, :vocab], ends(labels), reduction="sum")
    return [total, torch.autograd.grad(losses * factor, leaf)[0]]


def _view(results: list[Tensor]) -> list[Tensor]:
    return [results[0].double().sum(), *(ends(gradient) for gradient in results[1:])]


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
        exact=lambda: _exact(logits, labels, vocab, 1.0 / sizes["T"], dtype), view=_view,
    )  # fmt: skip


def _in_place(op: str, sizes: Sizes, dtype: str, device: str) -> Case:
    """Losses, and the gradient in the place of the logits; most peers make it as a second tensor."""
    sizes, fresh, labels, vocab = _logits(sizes, dtype, device)
    logits = fresh.clone()

    def adapt(function: Function) -> Function:
        return lambda: [function(logits, labels, vocab), logits]

    def through(loss: Function) -> Function:
        def step() -> list[Tensor]:
            leaf = logits.detach().requires_grad_()
            losses = loss(leaf)
            losses = losses[0] if isinstance(losses, tuple) else losses
            return [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]

        return step

    def own(x: Tensor) -> Tensor:
        return F.cross_entropy(x[:, :vocab], labels, reduction="none")

    peers: dict[str, Function] = {}
    liger = liger_function(device, "cross_entropy", "LigerCrossEntropyFunction")
    if liger and vocab == sizes["V"]:  # it takes no columns that do not exist
        peers["liger"] = through(lambda x: liger.apply(x, labels, None, IGNORE, 0.0, 0.0, "sum"))
    flops, read = cost("cross_entropy", sizes, dtype)
    flops_back, rewritten = cost("cross_entropy_backward", sizes, dtype)
    moved = rewritten + read * (op != "cross_entropy_")  # the collective stands between two reads of a row
    return Case(
        op, sizes, dtype, device, "copy", {"step": (flops + flops_back, moved)}, adapt,
        lambda wrap: through(wrap(own)), peers=peers, prepare=refill([logits], [fresh]),
        exact=lambda: _exact(fresh, labels, vocab, 1.0, dtype), view=_view, compiles=op == "cross_entropy_",
    )  # fmt: skip


cross_entropy_ = partial(_in_place, "cross_entropy_")
vocab_parallel_cross_entropy_ = partial(_in_place, "vocab_parallel_cross_entropy_")


def linear_cross_entropy(sizes: Sizes, dtype: str, device: str) -> Case:
    """Backward alone is no mode of it: the gradients are made in the forward pass.

    sink=1: the gradient of the weight goes into an fp32 buffer, and the upstream gradient is told beforehand, as in
    training; peers return theirs in the dtype of the weight.
    """
    sizes = take(sizes, "T", "H", "V", sink=0)
    rows, width, vocab = sizes["T"], sizes["H"], sizes["V"]
    leaves = [randn((rows, width), dtype, device), randn((vocab, width), dtype, device, scale=width**-0.5)]
    labels = torch.randint(0, vocab, (rows,), device=device)
    upstream = torch.tensor(1.0 / rows, device=device)

    def adapt(function: Function) -> Function:
        told = {"upstream": upstream} if "sink" in sizes else {}
        return lambda x, weight: function(x, weight, labels, **told)

    def own(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).float(), labels, reduction="sum")

    peers: dict[str, Function] = {}
    if liger := liger_function(device, "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"):

        def through_liger(x: Tensor, weight: Tensor) -> Tensor:
            loss = liger.apply(x, weight, labels, None, None, IGNORE, 0.0, 0.0, "sum")
            return loss[0] if isinstance(loss, tuple) else loss  # type: ignore[no-any-return]

        peers["liger"] = through_liger
    work = twice("linear_cross_entropy", sizes, dtype)
    del work["backward"]
    return Case(
        "linear_cross_entropy", sizes, dtype, device, "product", work, adapt, lambda wrap: wrap(own), leaves,
        [upstream], peers, exact=lambda: _exact_with_layer(leaves[0], leaves[1], labels, dtype),
        view=lambda results: [*results[:1], *(ends(dx) for dx in results[1:2]), *(dw[:SOME] for dw in results[2:])],
        sunk=1 if "sink" in sizes else None,
    )  # fmt: skip


def _exact_with_layer(x: Tensor, weight: Tensor, labels: Tensor, dtype: str) -> list[Tensor]:
    """The loss, dx of the rows at both ends and the first rows of dW, from all logits, chunk by chunk."""
    kind = wider(dtype)
    x, weight = x.to(kind), weight.to(kind)
    rows, vocab = x.shape[0], weight.shape[0]
    loss, dweight = x.new_zeros(()), torch.zeros_like(weight[:SOME])

    def gradient(part: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        logits = part @ weight.T
        losses = F.cross_entropy(logits, at, reduction="sum")
        probabilities = logits.softmax(-1)
        probabilities[torch.arange(len(at), device=at.device), at] -= 1.0
        return losses, probabilities.div_(rows)

    for part, at in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
        losses, dlogits = gradient(part, at)
        loss += losses
        dweight += dlogits[:, : min(SOME, vocab)].T @ part
    return [loss, gradient(ends(x), ends(labels))[1] @ weight, dweight]


def vocab_parallel_linear_cross_entropy(sizes: Sizes, dtype: str, device: str) -> Case:
    """One shard that holds all of V, to be compared with `unsharded`: linear_cross_entropy as it is in use."""
    whole = linear_cross_entropy({**sizes, "sink": 0}, dtype, device)
    vocab = whole.sizes["V"]
    labels = torch.randint(0, vocab, (whole.sizes["T"],), device=device)

    def adapt(function: Function) -> Function:
        return lambda x, weight: function(x, weight, labels, lambda stats: stats.unsqueeze(0), 0, vocab)

    x_and_weight = whole.leaves
    unsharded = registry.choose(device, None, DTYPES[dtype]).linear_cross_entropy
    peers: dict[str, Any] = {"unsharded": lambda x, weight: unsharded(x, weight, labels)}
    work = twice("vocab_parallel_linear_cross_entropy", whole.sizes, dtype)
    del work["backward"]
    return Case(
        "vocab_parallel_linear_cross_entropy", whole.sizes, dtype, device, "product", work, adapt, None, whole.leaves,
        whole.upstream, peers, exact=partial(_exact_with_layer, x_and_weight[0], x_and_weight[1], labels, dtype),
        view=whole.view,
    )  # fmt: skip
