"""How time is taken: single calls, caches emptied before each, providers taking turns, ceilings between them.

On the CPU a call is timed by the wall clock, and the minimum of the repeats counts: on a machine that others use too it
is the number that depends least on them. On CUDA a call stands between two events while the host is kept ahead by a
sleeping kernel, so what Python costs is not in it, and the median counts: its kernels follow each other as in a CUDA
graph. The wall clock beside it tells what a call costs with Python. The CUDA side has not yet run on a GPU.
"""

import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

Work = Callable[[], object]

FLUSH_CAP = 1 << 29
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
CYCLES_PER_S = 2e9  # of a GPU's clock, at most: torch.cuda._sleep counts cycles
LEAST_AHEAD_S, MOST_AHEAD_S = 5e-4, 5e-2
PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}


def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache; 32 MiB where the system does not tell."""
    found = [os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE") for level in (4, 3, 2) if _known(f"SC_LEVEL{level}_CACHE_SIZE")]
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")):
        text = index.read_text().strip()
        found.append(int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    return max(found, default=0) or 1 << 25


def _known(name: str) -> bool:
    return name in os.sysconf_names and os.sysconf(name) > 0


class Timer:
    """Times calls on one device. `cold`: what a case touches is pushed out of the caches before each call."""

    def __init__(self, device: str, cold: bool = True) -> None:
        self.device = device.split(":")[0]
        self.cold = cold
        size = min(2 * last_level_cache(), FLUSH_CAP) if self.device == "cpu" else 1 << 28
        self._flush = torch.zeros(size // 4 if cold else 0, dtype=torch.float32, device=device)
        self._enqueued: MutableMapping[Work, float] = WeakKeyDictionary()  # a work may hold much memory
        self.by = "minimum" if self.device == "cpu" else "median"

    def milliseconds(self, work: Work, prepare: Callable[[], None] | None = None) -> float:
        """The time of one call; `prepare` is not in it."""
        if prepare is not None:
            prepare()
        if self.device != "cpu":
            return self._on_cuda(work)
        if self.cold:
            self._flush.sum()  # reading leaves nothing to be written back while the call is timed
        return _seconds(work) * 1e3

    def _on_cuda(self, work: Work) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if self.cold:
            self._flush.zero_()
        # Three times what enqueueing this work took, within bounds: a first call may have compiled what it calls.
        ahead = min(max(3 * self._enqueued.get(work, 3e-4), LEAST_AHEAD_S), MOST_AHEAD_S)
        torch.cuda._sleep(int(ahead * CYCLES_PER_S))
        begin.record()
        enqueued = _seconds(work)
        end.record()
        end.synchronize()
        self._enqueued[work] = min(enqueued, self._enqueued.get(work, enqueued))
        return float(begin.elapsed_time(end))

    def wall(self, work: Work, calls: int = 10) -> float:
        """Milliseconds of the wall clock for a call on CUDA, of `calls` enqueued in a row: the longer of what the host
        and what the device need for one."""

        def row() -> None:
            for _ in range(calls):
                work()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        return _seconds(row) * 1e3 / calls

    def turns(
        self,
        works: Mapping[str, tuple[Work, Callable[[], None] | None]],
        repeats: int,
        deadline: float = float("inf"),
        least: int = 3,
    ) -> dict[str, list[float]]:
        """Milliseconds of `repeats` calls of each work, one call of each in turn, each round beginning with another.

        No round begins after `deadline` (time.monotonic()), but `least` rounds are made in any case.
        """
        times: dict[str, list[float]] = {name: [] for name in works}
        names = list(works)
        for turn in range(repeats):
            if turn >= least and time.monotonic() >= deadline:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(self.milliseconds(*works[name]))
        return times


class Ceilings:
    """The rates that bound a kernel, measured between its repeats: a copy, and a square product in each dtype.

    A CPU without instructions for a 16-bit dtype multiplies it best through fp32, whose rate is the bound then: torch's
    own product of such can be a hundred times as slow.
    """

    def __init__(self, device: str) -> None:
        kind = device.split(":")[0]
        self._source = torch.ones(COPY_BYTES[kind] // 8, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        self._side, self._device = PRODUCT_SIDE[kind], device
        self._square: dict[torch.dtype, torch.Tensor] = {}
        self.best: dict[str, float] = {}

    def probe(self, bound: str, dtype: torch.dtype) -> Work:
        """A call that measures "copy" or "product" once."""
        if bound == "copy":
            return lambda: self._target.copy_(self._source)
        if dtype not in self._square:
            square = torch.randn(self._side, self._side, device=self._device)
            self._square[dtype] = square.to(self._multiplied_as(dtype))
        square = self._square[dtype]
        return lambda: square @ square

    def _multiplied_as(self, dtype: torch.dtype) -> torch.dtype:
        if self._device != "cpu" or dtype.itemsize > 2:
            return dtype
        small = {kind: torch.randn(256, 256).to(kind) for kind in (dtype, torch.float32)}
        works: dict[torch.dtype, Callable[[], object]] = {kind: partial(torch.mm, a, a) for kind, a in small.items()}
        times = {kind: [_seconds(work) for _ in range(3)] for kind, work in works.items()}
        return min(times, key=lambda kind: min(times[kind]))

    def note(self, bound: str, dtype: str, milliseconds: float) -> None:
        """Keeps the best rate: GB/s read and written of "copy", TFLOP/s of "product <dtype>"."""
        if bound == "copy":
            key, rate = "copy", 2 * self._source.nbytes / milliseconds / 1e6
        else:
            key, rate = f"product {dtype}", 2 * self._side**3 / milliseconds / 1e9
        self.best[key] = max(rate, self.best.get(key, 0.0))

    def rate(self, bound: str, dtype: str) -> float:
        return self.best["copy" if bound == "copy" else f"product {dtype}"]


def _seconds(work: Work) -> float:
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
