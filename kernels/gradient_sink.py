"""Where the gradient of a parameter is wanted, if its owner has said so.

Autograd returns a gradient in the dtype of its parameter, and somebody adds it up. A training engine that keeps sums in
buffers of its own may instead hang a `gradient_sink` on the parameter: an op whose backward can write there does so,
without a pass of its own for the addition and, into an fp32 buffer, without rounding, and returns no gradient to
autograd. Ops that know nothing of it return theirs as ever.
"""

from typing import Protocol

import torch
from torch import Tensor


class GradientSink(Protocol):
    """Called once by each backward that will write: gives the buffer and counts the gradient as arrived."""

    def __call__(self) -> tuple[Tensor, bool]:
        """(buffer of the parameter's shape, fp32 or of its dtype; True: add to it, False: overwrite it)."""
        ...


def sink_of(parameter: Tensor | None) -> GradientSink | None:
    """The sink of `parameter`; None where it has none or needs no gradient, and inside torch.compile, which would have
    to trace through it."""
    if parameter is None or torch.compiler.is_compiling():
        return None
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return None
    return getattr(parameter, "gradient_sink", None)
