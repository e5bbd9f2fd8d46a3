"""The time of what several ranks do together: that of the slowest.

All ranks meet, run a call so many times, and agree on the longest time, so that all of them know the same number and
decide alike. On CUDA the time is between two events of the current stream, into which the collectives are synchronised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from .comm import Group

LEAST = 2e-3
"""Seconds that a measurement should last: ranks leave their meeting some 20 us apart, 1% of this."""
MOST_CALLS = 2000
Once = Callable[[int], float]
"""Runs a call so many times in a row and returns the seconds of one, on the slowest rank."""


class Watch(Protocol):
    """What times for all ranks: a Stopwatch, or a stand-in with a model of the link."""

    def __call__(self, call: Callable[[], object], calls: int = 1) -> float: ...
    def most(self, number: float) -> float: ...


class Stopwatch:
    """Of all ranks of `world`, whose group takes CPU tensors."""

    def __init__(self, world: Group, device: torch.device) -> None:
        self.world, self.device = world, device
        self._longest = torch.zeros(1, dtype=torch.float64)

    def __call__(self, call: Callable[[], object], calls: int = 1) -> float:
        """Seconds of one of `calls` calls in a row, on the slowest rank; the same number on all."""
        self.most(0.0)
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds = time.perf_counter() - start
        return self.most(seconds / calls)

    def most(self, number: float) -> float:
        """The largest of the numbers that the ranks come with; none goes on before all are there."""
        self._longest[0] = number
        if self.world.size > 1:
            dist.all_reduce(self._longest, op=dist.ReduceOp.MAX, group=self.world.handle)
        return float(self._longest)


def calls_for(once: Once, least: float = LEAST) -> int:
    """How many calls last `least` seconds, after warming up."""
    once(2)
    seconds = once(3)
    return max(1, min(MOST_CALLS, round(least / seconds + 0.5))) if seconds > 0 else MOST_CALLS


def sample(of: Sequence[Once], repeats: int, budget: float, least: float = LEAST) -> list[list[float]]:
    """Up to `repeats` times of one call of each, five at least, in about `budget` seconds for all together.

    They take turns, so that what else the machine does for a moment hits one time of each and no median.
    """
    counts = [calls_for(once, least) for once in of]
    times: list[list[float]] = [[] for _ in of]
    spent = 0.0
    for number in range(repeats):
        if number >= 5 and spent > budget:
            break
        for once, calls, found in zip(of, counts, times, strict=True):
            found.append(once(calls))
            spent += found[-1] * calls
    return times
