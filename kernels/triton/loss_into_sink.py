"""Linear + cross-entropy whose weight gradient is added to its owner's buffer as cuBLAS makes it.

Which of the two, and the products and kernels they call: linear_cross_entropy.py. A gradient sink is a Python object,
which an op of torch.library cannot take, so these are autograd.Functions. Importing this file imports no Triton.
"""

from typing import Any

import torch
from torch import Tensor

from ..linear_cross_entropy import check_promise
from ..wide_product import write_product
from .library import late

Settings = tuple[int, float, float, int]
"""ignore_index, label_smoothing, z_loss, vocab."""


class KeptLogits(torch.autograd.Function):
    """One chunk: the backward turns the logits into their gradient, with the upstream one folded in.

    dW is not postponed where other weight gradients are (the W of zero-bubble schedules): that would keep the logits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, settings: Settings) -> Tensor:
        loss, logits, lse = late("linear_cross_entropy", "forward_one_chunk")(x, weight, labels, *settings)
        ctx.save_for_backward(logits, lse, x, weight, labels)
        ctx.weight, ctx.settings = weight, settings  # the weight for its sink, not its values
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, x, weight, labels = ctx.saved_tensors
        late("linear_cross_entropy", "turn_into_gradient")(dloss, logits, lse, labels, ctx.settings)
        dx = torch.mm(logits, weight) if ctx.needs_input_grad[0] else None
        dweight, accumulate = ctx.weight.gradient_sink()
        write_product(dweight, logits.T, x, accumulate)
        ctx.weight.gradient_sink.written()
        return dx, None, None, None


class Chunks(torch.autograd.Function):
    """More chunks: both gradients are made in the forward, for the upstream gradient that the caller promises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, settings: Settings) -> Tensor:
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight, accumulate = weight.gradient_sink()  # type: ignore[attr-defined]
        loss = late("linear_cross_entropy", "in_chunks")(x, weight, labels, settings, upstream, dx, dweight, accumulate)
        weight.gradient_sink.written()  # type: ignore[attr-defined]
        ctx.save_for_backward(dx, upstream)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, upstream = ctx.saved_tensors
        check_promise(dloss, upstream)
        return dx, None, None, None, None
