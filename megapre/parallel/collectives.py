"""The collectives as they are timed: one call on one group with buffers of a given size, and a look at what arrives.

Sizes are nccl-tests': the bytes of the largest buffer of a rank (doc/PERFORMANCE.md there). A message of send_recv goes
there and back, so that the time of a call is that of two messages: a send alone ends when its bytes are on their way.

What arrives is compared number by number. Rank r sends (i + 31 r) mod 127 at place i, whole numbers of which fp32 adds
up those of 132,000 ranks without rounding, and which differ between neighbours in place and in rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import CommError, Group, Groups, all_gather, reduce_scatter

ELEMENT = 4
PERIOD, SHIFT = 127, 31
AXES = ("tp", "cp", "dp", "pp", "world")


def pattern(rank: int, start: int, stop: int, device: torch.device) -> Tensor:
    """What rank `rank` of a group sends at the places [start, stop)."""
    return (torch.arange(start, stop, device=device) + SHIFT * rank).remainder_(PERIOD).float()


class Call:
    """One collective among the ranks of a group, each of which makes one alike. `()` runs it to its end on the CPU, and
    to its being queued on CUDA. `messages`: how many one call sends, one after the other.
    """

    def __init__(self, collective: str, groups: Groups, axis: str, size: int, group: Group | None = None) -> None:
        self.collective, self.device = collective, groups.device
        self.group = group or group_of(groups, axis)
        self.size = size
        self.messages = 2 if collective == "send_recv" else 1
        count = size // ELEMENT
        part = count // self.group.size
        ins, outs = {"reduce_scatter": (count, part), "all_gather": (part, count)}.get(collective, (count, count))
        self.sent = torch.zeros(ins, device=self.device)
        in_place = collective in ("all_reduce", "broadcast", "send_recv")
        self.arrived = self.sent if in_place else torch.zeros(outs, device=self.device)
        self.run = self._prepared(groups, axis)

    def __call__(self) -> None:
        self.run()

    def _prepared(self, groups: Groups, axis: str) -> Callable[[], object]:
        sent, arrived, handle = self.sent, self.arrived, self.group.handle
        if self.collective == "send_recv":
            return self._to_and_fro(groups, axis)
        collectives: Mapping[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(sent, group=handle),
            "reduce_scatter": lambda: reduce_scatter(arrived, sent, group=handle),
            "all_gather": lambda: all_gather(arrived, sent, group=handle),
            "broadcast": lambda: dist.broadcast(sent, group_src=0, group=handle),
            "all_to_all": lambda: dist.all_to_all_single(arrived, sent, group=handle),
        }
        return collectives[self.collective]

    def _to_and_fro(self, groups: Groups, axis: str) -> Callable[[], object]:
        """Neighbours 0-1, 2-3, ... of the group, all at once; the last of an odd number rests. In a pipeline they use
        its channels, one for each direction.
        """
        first = self.group.index % 2 == 0
        other = self.group.index + (1 if first else -1)
        if other == self.group.size:
            return lambda: None
        out = into = (self.group, other)
        if axis == "pp":
            peer = self.group.ranks[other]
            to, fro = groups.send[peer], groups.receive[peer]
            out, into = (to, 1 - to.index), (fro, 1 - fro.index)

        def send() -> None:
            dist.send(self.sent, group=out[0].handle, group_dst=out[1])

        def receive() -> None:
            dist.recv(self.sent, group=into[0].handle, group_src=into[1])

        def call() -> None:
            for step in (send, receive) if first else (receive, send):
                step()

        return call

    def check(self) -> str:
        """Runs once with numbers that are known, and says what is wrong with those that arrive; "" if nothing is."""
        me, n, count = self.group.index, self.group.size, self.size // ELEMENT
        part = count // n
        first = me * part
        own = self.collective == "all_gather"
        self.sent.copy_(pattern(me, first if own else 0, first + part if own else count, self.device))
        if self.arrived is not self.sent:
            self.arrived.fill_(-1)
        self.run()
        wrong = int((self.arrived != self._expected(me, n, count, part)).sum())
        self.sent.zero_()  # sums of sums would grow without end
        return f"{wrong:,} of {self.arrived.numel():,} numbers are wrong on rank {me} of the group" if wrong else ""

    def _expected(self, me: int, n: int, count: int, part: int) -> Tensor:
        device = self.device
        if self.collective == "all_reduce":
            return _total(n, 0, count, device)
        if self.collective == "reduce_scatter":
            return _total(n, me * part, (me + 1) * part, device)
        if self.collective == "all_gather":
            return torch.cat([pattern(rank, rank * part, (rank + 1) * part, device) for rank in range(n)])
        if self.collective == "all_to_all":
            return torch.cat([pattern(rank, me * part, (me + 1) * part, device) for rank in range(n)])
        source = 0 if self.collective == "broadcast" else me - me % 2  # what went there comes back
        return pattern(source, 0, count, device)


def _total(n: int, start: int, stop: int, device: torch.device) -> Tensor:
    """The sum over n ranks. It has the pattern's period, so one period of sums is enough."""
    one = torch.stack([pattern(rank, 0, PERIOD, device) for rank in range(min(n, PERIOD))])
    times, rest = divmod(n, PERIOD)
    sums = one.sum(0) * times + one[:rest].sum(0) if times else one.sum(0)
    return sums[torch.arange(start, stop, device=device) % PERIOD]


def group_of(groups: Groups, axis: str) -> Group:
    """The group along `axis`, one of AXES. Raises CommError for another."""
    found: dict[str, Group] = {name: getattr(groups, name) for name in AXES}
    if axis not in found:
        raise CommError(f"there is no axis {axis!r} to measure; there are {', '.join(AXES)}")
    return found[axis]


def rounded(size: int, ranks: int) -> int:
    """`size` in bytes, up to the next that every rank of a group has an equal part of."""
    unit = ELEMENT * ranks
    return -(-size // unit) * unit
