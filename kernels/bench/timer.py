"""How time is taken: single calls, caches emptied before each, providers taking turns.

On the CPU a call is timed by the wall clock, and the minimum of the repeats counts: on a machine that others use too it
is the number that depends least on them. CUDA has a timer of its own (cuda_timer.py).
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

Work = Callable[[], object]
Prepare = Callable[[], None] | None

FLUSH_CAP = 1 << 29


class Beside(NamedTuple):
    """What is measured of a call beside its time on the device, where it runs there: see Row."""

    wall_ms: float = 0.0
    graph_ms: float = 0.0
    graph_note: str = ""
    peak_mib: float = 0.0


class Timer:
    """Times calls on the CPU. `cold`: what a case touches is pushed out of the caches before each call."""

    by = "minimum"
    least = 3
    """Calls that are made of each work in any case."""
    together = True
    """Whether all providers of a case are there at once, to take turns."""

    def __init__(self, cold: bool = True) -> None:
        self.cold = cold
        size = min(2 * last_level_cache(), FLUSH_CAP) if cold else 0
        self._flush = torch.zeros(size // 4, dtype=torch.float32)

    def milliseconds(self, work: Work, prepare: Prepare = None) -> float:
        """The time of one call; `prepare` is not in it."""
        if prepare is not None:
            prepare()
        if self.cold:
            self._flush.sum()  # reading leaves nothing to be written back while the call is timed
        return seconds(work) * 1e3

    def turns(
        self,
        works: Mapping[str, tuple[Work, Prepare]],
        repeats: int,
        deadline: float = float("inf"),
    ) -> dict[str, list[float]]:
        """Milliseconds of `repeats` calls of each work, one call of each in turn, each round beginning with another.

        No round begins after `deadline` (time.monotonic()), but `least` rounds are made in any case.
        """
        times: dict[str, list[float]] = {name: [] for name in works}
        names = list(works)
        for turn in range(repeats):
            if turn >= self.least and time.monotonic() >= deadline:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(self.milliseconds(*works[name]))
        return times

    def until(self, deadline: float) -> float:
        """When the repeats of one call end, where `deadline` (time.monotonic()) is that of their share."""
        return deadline

    def beside(self, work: Work, prepare: Prepare, repeats: int) -> Beside:
        """Nothing on a CPU, where the time is the wall clock's."""
        return Beside()

    def scope(self) -> AbstractContextManager[object]:
        """Where cases are built and called."""
        return nullcontext()

    def clear(self) -> None:
        """Between cases: gives back what the last one held."""


def timer_of(device: str, cold: bool = True) -> Timer:
    """The timer of "cpu" or "cuda"."""
    if device.split(":")[0] == "cpu":
        return Timer(cold)
    from .cuda_timer import CudaTimer

    return CudaTimer(cold)


def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache; 32 MiB where the system does not tell."""
    found = [os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE") for level in (4, 3, 2) if _known(f"SC_LEVEL{level}_CACHE_SIZE")]
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")):
        text = index.read_text().strip()
        found.append(int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    return max(found, default=0) or 1 << 25


def _known(name: str) -> bool:
    return name in os.sysconf_names and os.sysconf(name) > 0


def seconds(work: Work) -> float:
    """Of the wall clock."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def quantile(times: list[float], at: float) -> float:
    """Linear between the neighbours, as statistics.quantiles' inclusive method."""
    ordered = sorted(times)
    place = at * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
