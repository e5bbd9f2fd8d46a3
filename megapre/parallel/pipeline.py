"""Carries out one rank's actions of a pipeline schedule.

A schedule (megapre.schedule) says in which order a rank runs the forward (F) and backward (B) of each of its chunks for
each micro-batch. The executor walks that order and hands tensors from chunk to chunk. It knows nothing of transformers,
losses or optimizers: a chunk is anything with the two methods of `Chunk`.

With one rank every hand-over is local: what chunk c returns for a micro-batch is the input of chunk c + 1, and the
gradient that chunk c + 1 returns is what chunk c's backward receives. The last chunk's output is the loss, so its
backward receives None. Gradient accumulation needs no code of its own: it is the schedule of one rank with several
micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from megapre.schedule import Action


class Chunk(Protocol):
    """A consecutive piece of the model. It keeps what its own backward needs, by micro-batch."""

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        """Output of this chunk for `x`, which is None for the first chunk: that one fetches its micro-batch itself."""
        ...

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        """Accumulates parameter gradients and returns the gradient of `x` (None from the first chunk).

        `grad` is the gradient of this chunk's output, None for the last chunk, whose output is the loss.
        """
        ...


class Executor:
    """Runs `actions`, one rank's row of a schedule, over `chunks`, that rank's chunks in model order."""

    def __init__(self, actions: Sequence[Action], chunks: Sequence[Chunk]) -> None:
        self.actions = tuple(actions)
        self.chunks = tuple(chunks)
        named = {action.chunk for action in self.actions}
        if not named <= set(range(len(self.chunks))):
            raise ValueError(f"the schedule names chunks {sorted(named)}, this rank holds 0..{len(self.chunks) - 1}")

    def run(self) -> None:
        """One step: every action once, in order."""
        last = len(self.chunks) - 1
        # What waits for its reader, by (chunk that will read it, micro-batch). Popped on use: freed as soon as
        # possible.
        inputs: dict[tuple[int, int], Tensor] = {}
        grads: dict[tuple[int, int], Tensor] = {}
        for kind, chunk, micro_batch in self.actions:
            if kind == "F":
                x = inputs.pop((chunk, micro_batch)) if chunk > 0 else None
                y = self.chunks[chunk].forward(micro_batch, x)
                if chunk < last:
                    inputs[chunk + 1, micro_batch] = y
            elif kind == "B":
                grad = grads.pop((chunk, micro_batch)) if chunk < last else None
                dx = self.chunks[chunk].backward(micro_batch, grad)
                if chunk > 0:
                    assert dx is not None, f"chunk {chunk} returned no gradient for the chunk before it"
                    grads[chunk - 1, micro_batch] = dx
            else:
                raise ValueError(f"unknown action kind {kind!r}; this executor runs F and B")
        assert not inputs and not grads, f"never consumed: inputs {sorted(inputs)}, gradients {sorted(grads)}"
