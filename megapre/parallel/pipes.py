"""Messages between the stages of a pipeline: sends that nobody waits for, receives that are posted ahead.

All messages have one shape and one dtype, agreed on at the beginning. From one rank to another there is one channel
(megapre.parallel.comm), for activations and gradients alike, and its messages arrive in the order in which they were
sent: whoever posts receives must do it in that order.

A sent tensor is kept until it has left and then given up. NCCL says when that is; gloo only ends a wait, so there a
thread for each channel waits. The memory of what is received comes from torch's allocator, message by message: it alone
knows who still reads a tensor, and to take it from there costs nothing beside a stage's work.

Each wait has an end: after `timeout` seconds, or where the peer is gone, PipelineError.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import TIMEOUT, Group, Groups


class PipelineError(RuntimeError):
    """A rank of the pipeline did not send, take or do what it should: it is gone, stuck, or sends something else."""


class Receive(NamedTuple):
    """A receive that was posted, and where it puts what comes."""

    work: dist.Work
    tensor: Tensor


class Pipes:
    """The ends of all channels of one rank of a pipeline; ranks are counted within the pipeline.

    `shape` and `dtype` are those of every message. `timeout` is for each wait, in seconds. On CUDA it should be below
    that of the groups, whose own watchdog ends the process without a word on what was waited for.
    """

    def __init__(
        self, groups: Groups, shape: Sequence[int], dtype: torch.dtype, timeout: float = 0.8 * TIMEOUT
    ) -> None:
        self.group, self.device = groups.pp, groups.device
        self.shape, self.dtype, self.timeout = torch.Size(shape), dtype, timeout
        number = {rank: index for index, rank in enumerate(groups.pp.ranks)}
        self._receive = {number[peer]: group for peer, group in groups.receive.items()}
        self._send = {number[peer]: Outbox(group, groups.device) for peer, group in groups.send.items()}

    @property
    def rank(self) -> int:
        return self.group.index

    @property
    def ranks(self) -> int:
        return self.group.size

    @property
    def peers(self) -> set[int]:
        """Whom this rank has channels to and from."""
        return self._send.keys() & self._receive.keys()

    def name(self, rank: int) -> str:
        """A rank of the pipeline, for messages: also its number among all ranks, where that is another one."""
        overall = self.group.ranks[rank]
        return f"rank {rank}" if overall == rank else f"rank {rank} of its pipeline (rank {overall} of all)"

    def post(self, peer: int) -> Receive:
        """Begins to receive the next message of `peer`."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with self._waiting():
            work = dist.irecv(tensor, group=self._receive[peer].handle, group_src=1 - self._receive[peer].index)
        assert work is not None, "irecv without a group"
        return Receive(work, tensor)

    def take(self, receive: Receive) -> Tensor:
        """What came; the wait is the host's on the CPU, and the current stream's on CUDA."""
        with self._waiting():
            self._wait(receive.work)
        return receive.tensor

    def send(self, peer: int, tensor: Tensor) -> None:
        """Sends and returns at once. Raises PipelineError where an earlier message could not be sent."""
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            raise PipelineError(
                f"a message of {tensor.dtype} {tuple(tensor.shape)} in a pipeline of {self.dtype} {tuple(self.shape)}"
            )
        with self._waiting():
            self._send[peer].send(tensor.detach().contiguous())

    def sent(self) -> None:
        """Gives up what has left by now."""
        for outbox in self._send.values():
            outbox.sent()

    def drain(self) -> None:
        """On the CPU, waits until everything has left: the peers take it within the same step."""
        with self._waiting():
            for outbox in self._send.values():
                outbox.drain(self.timeout)

    def _wait(self, work: dist.Work) -> None:
        if self.device.type == "cpu":
            work.wait(timedelta(seconds=self.timeout))
        else:
            work.wait()  # with a timeout, NCCL would block the host

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Makes torch's errors PipelineErrors that say whether time was up."""
        begin = time.monotonic()
        try:
            yield
        except PipelineError:
            raise
        except RuntimeError as error:
            passed = time.monotonic() - begin
            what = f"nothing in {passed:.1f} s" if passed >= self.timeout else f"connection lost after {passed:.1f} s"
            raise PipelineError(f"{what} ({str(error).splitlines()[0]})") from error


class Outbox:
    """The sending end of a channel, and what may not have left yet."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group = group
        self._kept: deque[tuple[dist.Work, Tensor]] = deque()  # CUDA
        self._waiter = None if device.type == "cuda" else Waiter()

    def send(self, tensor: Tensor) -> None:
        if self._waiter is not None and self._waiter.failure is not None:
            raise self._waiter.failure
        work = dist.isend(tensor, group=self.group.handle, group_dst=1 - self.group.index)
        assert work is not None, "isend without a group"
        if self._waiter is not None:
            self._waiter.keep(work, tensor)
        else:
            self._kept.append((work, tensor))

    def sent(self) -> None:
        while self._kept and self._kept[0][0].is_completed():
            self._kept.popleft()

    def drain(self, timeout: float) -> None:
        if self._waiter is not None:
            self._waiter.drain(timeout)


class Waiter:
    """Keeps tensors until their sends over gloo are done, which only a wait can tell, so a thread waits."""

    def __init__(self) -> None:
        self.failure: RuntimeError | None = None
        self._queue: SimpleQueue[tuple[dist.Work, Tensor] | threading.Event | None] = SimpleQueue()
        self._busy = False
        threading.Thread(target=_give_up_what_was_sent, args=(self._queue, weakref.ref(self)), daemon=True).start()
        weakref.finalize(self, self._queue.put, None)  # the end of the thread

    def keep(self, work: dist.Work, tensor: Tensor) -> None:
        self._busy = True
        self._queue.put((work, tensor))

    def drain(self, timeout: float) -> None:
        """Raises what a send has raised, or RuntimeError where one is not done in `timeout` seconds."""
        if self._busy:
            done = threading.Event()
            self._queue.put(done)
            if not done.wait(timeout):
                raise RuntimeError("a message was sent and not taken")
            self._busy = False
        if self.failure is not None:
            raise self.failure


def _give_up_what_was_sent(
    queue: SimpleQueue[tuple[dist.Work, Tensor] | threading.Event | None], owner: weakref.ref[Waiter]
) -> None:
    while (item := queue.get()) is not None:
        if isinstance(item, threading.Event):
            item.set()
            continue
        try:
            item[0].wait()
        except RuntimeError as error:
            waiter = owner()
            if waiter is not None and waiter.failure is None:
                waiter.failure = error
            del waiter
        del item  # not only when the next one comes
