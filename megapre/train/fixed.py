"""The micro-batches of a step on the device, in shapes and at addresses that stay.

A recorded step reads its inputs where they lay when it was recorded; torch.compile compiles for the shapes it meets.
Tokens, labels and positions have one shape throughout a run. Document bounds do not: each micro-batch has as many as it
has documents. So they are filled up with documents of length 0 behind the last token, to 2^k + 1 bounds, where k only
grows: it can do so log2(tokens) times in a run, and mostly never does after the first steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from megapre.data import MicroBatch

LEAST_DOCUMENTS = 16

Shapes = tuple[tuple[int, ...], ...]


class Inputs(NamedTuple):
    """What a piece of the model takes of a micro-batch."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, part: MicroBatch) -> Inputs:
        """Where they are: on the host."""
        return cls(part.tokens, part.labels, part.positions, part.cu_seqlens)

    def to(self, device: torch.device) -> Inputs:
        """To CUDA through pinned memory, overlapping what runs."""
        return self._each(lambda tensor: _pinned(tensor, device).to(device, non_blocking=True))

    def like(self, device: torch.device) -> Inputs:
        """Memory for inputs of these shapes."""
        return self._each(lambda tensor: torch.empty_like(tensor, device=device))

    def fill(self, given: Inputs) -> None:
        """Overwrites these, on the device, with `given` from the host."""
        for own, tensor in zip(self, given, strict=True):
            if own is not None and tensor is not None:
                own.copy_(_pinned(tensor, own.device), non_blocking=True)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        positions = None if self.positions is None else change(self.positions)
        cu_seqlens = None if self.cu_seqlens is None else change(self.cu_seqlens)
        return Inputs(change(self.tokens), change(self.labels), positions, cu_seqlens)


class FixedInputs:
    """Holds the micro-batches of one step. With `in_place` their tensors are the same from step to step."""

    def __init__(self, device: torch.device, in_place: bool) -> None:
        self.device, self.in_place = device, in_place
        self.bounds = LEAST_DOCUMENTS + 1
        self.shapes: Shapes = ()
        """Those of the step at hand."""
        self.held: dict[Shapes, list[Inputs]] = {}

    def take(self, parts: Sequence[MicroBatch]) -> list[Inputs]:
        """The micro-batches `parts` on the device, until the next call."""
        self.bounds = max([self.bounds, *(_bounds(part.cu_seqlens) for part in parts)])
        given = [Inputs.of(part)._replace(cu_seqlens=filled(part.cu_seqlens, self.bounds)) for part in parts]
        if not self.in_place:
            return [inputs.to(self.device) for inputs in given]
        self.shapes = tuple((0,) if tensor is None else tuple(tensor.shape) for inputs in given for tensor in inputs)
        if self.shapes not in self.held:
            self.held[self.shapes] = [inputs.like(self.device) for inputs in given]
        for own, inputs in zip(self.held[self.shapes], given, strict=True):
            own.fill(inputs)
        return self.held[self.shapes]


def filled(cu_seqlens: Tensor | None, bounds: int) -> Tensor | None:
    """cu_seqlens with its end repeated up to so many bounds: documents of length 0, which hold no token."""
    if cu_seqlens is None:
        return None
    return torch.cat((cu_seqlens, cu_seqlens[-1:].expand(bounds - len(cu_seqlens))))


def _bounds(cu_seqlens: Tensor | None) -> int:
    """The next 2^k + 1 from the bounds that there are."""
    return 0 if cu_seqlens is None else (1 << max(len(cu_seqlens) - 2, 0).bit_length()) + 1


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor
