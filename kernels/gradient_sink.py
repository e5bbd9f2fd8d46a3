"""Where the gradient of a parameter is wanted, if its owner has said so.

Autograd returns a gradient in the dtype of its parameter, and somebody adds it up. A training engine that keeps sums in
buffers of its own may instead hang a `gradient_sink` on the parameter: an op whose backward can write there does so,
without a pass of its own for the addition and, into an fp32 buffer, without rounding, and returns no gradient to
autograd. Ops that know nothing of it return theirs as ever.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class GradientSink(Protocol):
    """The place of one parameter's gradient."""

    def __call__(self) -> tuple[Tensor, bool]:
        """(buffer of the parameter's shape, fp32 or of its dtype; True: add to it, False: overwrite it).

        Called once by each backward, as it begins to write.
        """
        ...

    def written(self) -> None:
        """Called when the gradient is in the buffer."""
        ...

    def when_due(self, write: Callable[[], None]) -> None:
        """Calls `write`, which calls the sink and fills its buffer: at once, or whenever the owner makes the weight
        gradients, apart from the rest of the backward (the W of zero-bubble schedules)."""
        ...


def sink_of(parameter: Tensor | None) -> GradientSink | None:
    """The sink of `parameter` for an op in its forward; None where it has none or needs no gradient, and inside
    torch.compile, which would have to trace through it."""
    if parameter is None or not (parameter.requires_grad and torch.is_grad_enabled()):
        return None
    return sink_in_backward(parameter)


def sink_in_backward(parameter: Tensor) -> GradientSink | None:
    """As `sink_of`, in a backward, where gradients of gradients are off."""
    return None if torch.compiler.is_compiling() else getattr(parameter, "gradient_sink", None)
