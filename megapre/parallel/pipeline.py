"""Carries out one rank's actions of a pipeline schedule.

A schedule (megapre.schedule) says in which order each rank runs forward (F) and backward (B, or its halves I and W) of
its chunks for each micro-batch. The executor walks its rank's order and hands tensors from chunk to chunk, over pipes
(megapre.parallel.pipes) where the next stage is on another rank. It knows nothing of transformers, losses or
optimizers: a chunk is anything with the methods of `Chunk`. With one rank every hand-over is local, and gradient
accumulation needs no code of its own: it is the schedule of one rank with several micro-batches.

When receives are posted is worked out beforehand (megapre.parallel.handover), such that a checked schedule cannot
deadlock. A peer that is gone or stuck is another matter: each wait ends with an error that names rank, action and peer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from megapre.schedule import Action, Schedule, checked

from .handover import messages, steps
from .pipes import PipelineError, Pipes, Receive

if TYPE_CHECKING:
    from torch import Tensor

    from .trace import Trace

ON_DEVICE = 8
"""Actions that the host may be ahead of a CUDA device: enough to keep it fed, few enough to see a hang, and to bound
the memory of outputs that have left but whose send the host has not yet seen done."""


class Chunk(Protocol):
    """A consecutive piece of the model. It keeps what its own backward needs, by micro-batch."""

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        """Output of this chunk for `x`, which is None for the first stage: that one fetches its micro-batch itself.

        `x` is no leaf of a graph yet. The output of the last stage is the loss, which nobody but the chunk looks at.
        The output is freed once it was sent if the chunk does not keep it (torch.autograd.graph.get_gradient_edge is
        all that a backward needs of it). Under torch.no_grad the chunk should keep nothing: there is no backward.
        """
        ...

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        """Accumulates parameter gradients and returns the gradient of `x` (None from the first stage).

        `grad` is the gradient of this chunk's output, None for the last stage.
        """
        ...


@runtime_checkable
class SplitChunk(Chunk, Protocol):
    """A chunk for schedules that split the backward. After forward either `backward` is called, or these two."""

    def backward_input(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        """Returns the gradient of `x` as `backward` does, and leaves those of the weights for later."""
        ...

    def backward_weights(self, micro_batch: int) -> None:
        """Accumulates the parameter gradients that `backward_input` left."""
        ...


class Executor:
    """Runs one rank's row of `schedule` over `chunks`, that rank's chunks in model order.

    Which rank it is, and how to reach the others, say the pipes; a pipeline of one rank has none. With `evaluation` it
    runs the forwards only, without gradients; an executor of its own, it shares chunks and pipes with that of training.
    Raises ScheduleError for a schedule that cannot run, and ValueError where schedule, chunks and pipes do not fit.
    """

    def __init__(
        self, schedule: Schedule, chunks: Sequence[Chunk], pipes: Pipes | None = None, evaluation: bool = False
    ) -> None:
        ranks, rank = (1, 0) if pipes is None else (pipes.ranks, pipes.rank)
        if (schedule.ranks, schedule.chunks) != (ranks, len(chunks)):
            raise ValueError(
                f"the schedule is for {schedule.ranks} ranks of {schedule.chunks} chunks; here are {ranks} ranks, and "
                f"{len(chunks)} chunks on rank {rank}"
            )
        self.schedule, self.rank, self.pipes, self.evaluation = checked(schedule), rank, pipes, evaluation
        self.steps = tuple(steps(schedule, rank, evaluation))
        self._calls = tuple(_call(chunks[step.action.chunk], step.action) for step in self.steps)
        peers = {way.peer for step in self.steps for way in (step.receives, step.sends) if way is not None}
        if pipes is not None and (absent := sorted(peers - pipes.peers)):
            raise ValueError(f"rank {rank} has no channel to rank {absent[0]}; connect the pipeline with wrap=True")
        self._pace = Pace(self) if pipes is not None and pipes.device.type == "cuda" else None

    def run(self, trace: Trace | None = None) -> None:
        """One step: every action once, in order. Raises PipelineError.

        On CUDA the actions are issued, and may end later; so an error may come with the next run, or from `settle`.
        """
        with torch.no_grad() if self.evaluation else nullcontext():
            self._run(trace)

    def _run(self, trace: Trace | None) -> None:
        pipes, pace = self.pipes, self._pace
        posted: dict[int, Receive] = {}
        here: dict[int, Tensor] = {}  # what waits for another chunk of this rank. Popped on use: freed soon
        for at, (step, call) in enumerate(zip(self.steps, self._calls, strict=True)):
            for way in step.posts:
                posted[way.event] = self._post(at, way.peer)
            if trace is not None:
                trace.mark()
            receive, tensor = None, None
            if step.receives is not None:
                receive = posted.pop(step.receives.event)
                tensor = self._take(at, receive)
            elif step.takes is not None:
                tensor = here.pop(step.takes)
            if trace is not None:
                trace.mark()
            tensor = call(step.action.micro_batch, tensor)
            if trace is not None:
                trace.mark()
            if step.sends is not None or step.gives is not None:
                assert tensor is not None, f"{step.action} returned no tensor for the next stage"
                if step.sends is not None:
                    self._send(at, step.sends.peer, tensor)
                elif step.gives is not None:
                    here[step.gives] = tensor
            del tensor
            if pipes is not None:
                pipes.sent()
                if pace is not None:
                    pace.issued(at, receive)
        assert not here and not posted, f"never consumed: {sorted([*here, *posted])}"
        if pipes is not None:
            try:
                pipes.drain()
            except PipelineError as error:
                raise PipelineError(
                    f"{self.name} ran all its actions, but a peer took not all it sent: {error}"
                ) from error

    def settle(self) -> None:
        """Waits until all actions have ended; on the CPU they have. Raises PipelineError.

        To be called before the host reads anything of a step from a CUDA device: a read would wait without end.
        """
        if self._pace is not None:
            self._pace.settle()

    @property
    def name(self) -> str:
        return "rank 0" if self.pipes is None else self.pipes.name(self.rank)

    def where(self, at: int) -> str:
        """Rank, action and, if it takes something from a peer, that and what was received before: for messages."""
        step = self.steps[at]
        place = f"{self.name}, action {at} of {len(self.steps)} ({step.action})"
        if step.receives is None or self.pipes is None:
            return place
        peer = step.receives.peer
        sent = {event: action for action, event in messages(self.schedule, peer, self.rank, self.evaluation)}
        taken = [way.event for way in (earlier.receives for earlier in self.steps[:at]) if way and way.peer == peer]
        last = f", the last one its {sent[taken[-1]]}" if taken else ""
        return (
            f"{place}, waits for {sent[step.receives.event]} of {self.pipes.name(peer)}, from which it took "
            f"{len(taken)} of {len(sent)} messages so far{last}"
        )

    def _post(self, at: int, peer: int) -> Receive:
        assert self.pipes is not None
        try:
            return self.pipes.post(peer)
        except PipelineError as error:
            raise PipelineError(f"{self.where(at)}; cannot receive from {self.pipes.name(peer)}: {error}") from error

    def _take(self, at: int, receive: Receive) -> Tensor:
        assert self.pipes is not None
        try:
            return self.pipes.take(receive)
        except PipelineError as error:
            raise PipelineError(f"{self.where(at)}: {error}") from error

    def _send(self, at: int, target: int, tensor: Tensor) -> None:
        assert self.pipes is not None
        try:
            self.pipes.send(target, tensor)
        except PipelineError as error:
            action = self.steps[at].action
            raise PipelineError(f"{self.name} sends {action} to {self.pipes.name(target)}: {error}") from error


class Pace:
    """Lets the host be ON_DEVICE actions ahead of a CUDA device, and sees there what never ends."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.issued_at: deque[tuple[int, Receive | None, torch.cuda.Event]] = deque()

    def issued(self, at: int, receive: Receive | None) -> None:
        event = torch.cuda.Event()
        event.record()
        self.issued_at.append((at, receive, event))
        while len(self.issued_at) > ON_DEVICE:
            self._wait()

    def settle(self) -> None:
        while self.issued_at:
            self._wait()

    def _wait(self) -> None:
        at, receive, event = self.issued_at.popleft()
        assert self.executor.pipes is not None
        timeout = self.executor.pipes.timeout
        end = time.monotonic() + timeout
        while not event.query():
            if time.monotonic() > end:
                came = " (which came)" if receive is not None and receive.work.is_completed() else ""
                raise PipelineError(f"{self.executor.where(at)}{came}: not done in {timeout:.1f} s")
            time.sleep(5e-5)


def _call(chunk: Chunk, action: Action) -> Callable[[int, Tensor | None], Tensor | None]:
    if action.kind == "F":
        return chunk.forward
    if action.kind == "B":
        return chunk.backward
    if not isinstance(chunk, SplitChunk):
        raise ValueError(f"{action} is half of a backward, and {type(chunk).__name__} cannot split it")
    if action.kind == "I":
        return chunk.backward_input

    def weights(micro_batch: int, _: Any) -> None:
        chunk.backward_weights(micro_batch)

    return weights
