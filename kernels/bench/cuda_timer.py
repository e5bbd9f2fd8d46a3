"""Time on a GPU: single calls between events, the same call replayed from a CUDA graph, and by the wall clock.

A call stands between two events, after the L2 cache was overwritten, while a sleeping kernel keeps the device busy:
the host enqueues all of the call before the device comes to it, so what Python costs is not in the time. Where the
device came first, the call is made again behind a longer sleep. The median counts. Overwriting leaves the cache full
of lines that must be written back while the call runs, as the work before it in a step does; in turn the call's own
last lines stay there: what it moves is what is counted.

All of a run is on one stream that is not the default one: it can be captured, and a backward runs on the stream of its
forward, so that the graph of a backward alone is captured too. The CUDA side has not yet run on a GPU.
"""

import gc
import time
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .timer import Beside, Prepare, Timer, Work, quantile, seconds

DEVICE = "cuda"
FLUSH_BYTES = 1 << 28  # several times the L2 cache of any GPU
CYCLES_PER_S = 2e9  # of a GPU's clock, at most: torch.cuda._sleep counts cycles
LEAST_AHEAD_S, MOST_AHEAD_S = 5e-4, 2e-2
ATTEMPTS = 3
SPEND_S = 0.3  # on the repeats of one call
WALL_S = 0.1


class CudaTimer(Timer):
    """Times calls on the current CUDA device; see the head of this file."""

    by = "median"
    least = 7
    together = False  # what one provider keeps for its backward, and its graph, would be in the next one's way

    def __init__(self, cold: bool = True) -> None:
        self.cold = cold
        self.stream = torch.cuda.Stream()
        self._flush = torch.zeros(FLUSH_BYTES // 4 if cold else 0, dtype=torch.int32, device=DEVICE)
        self._enqueued: MutableMapping[Work, float] = WeakKeyDictionary()  # a work may hold much memory
        self._no_capture = ""

    def milliseconds(self, work: Work, prepare: Prepare = None) -> float:
        """The time of one call on the device; `prepare` is not in it, nor is the host, if it can be helped."""
        ahead = 3 * self._enqueued.get(work, 0.0)
        for _ in range(ATTEMPTS):
            # Within bounds: a first call may have compiled what it calls, and one that waits for the device waits
            # for the sleep too.
            ahead = min(max(ahead, LEAST_AHEAD_S), MOST_AHEAD_S)
            took, enqueued, hidden = self._once(work, prepare, ahead)
            self._enqueued[work] = min(enqueued, self._enqueued.get(work, enqueued))
            if hidden or ahead == MOST_AHEAD_S:
                break
            ahead = max(2 * ahead, 2 * enqueued)
        return took

    def _once(self, work: Work, prepare: Prepare, ahead: float) -> tuple[float, float, bool]:
        """(milliseconds on the device, seconds to enqueue it, whether the device came to it later than that)."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if prepare is not None:
            prepare()
        torch.cuda.synchronize()
        if self.cold:
            self._flush.zero_()
        torch.cuda._sleep(int(ahead * CYCLES_PER_S))
        begin.record()
        enqueued = seconds(work)
        hidden = not begin.query()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)), enqueued, hidden

    def until(self, deadline: float) -> float:
        return min(deadline, time.monotonic() + SPEND_S)

    def beside(self, work: Work, prepare: Prepare, repeats: int) -> Beside:
        """The wall clock's time, the graph's, and the memory that a call takes."""
        peak, wall = self.peak_mib(work), self.wall(work)
        graph, note = 0.0, self._no_capture or self._why_not(work, prepare)
        if not note:
            graph, note = self._replayed(work, prepare, repeats)
        return Beside(wall, graph, note, peak)

    def peak_mib(self, work: Work) -> float:
        """MiB that a call allocates beyond what is held before it, at most at one time."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - held) / 2**20

    def wall(self, work: Work) -> float:
        """Milliseconds of the wall clock for a call, of several enqueued in a row with nothing prepared between: the
        longer of what the host and what the device need for one."""

        def synchronized() -> None:
            work()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        calls = min(max(int(WALL_S / seconds(synchronized)), 2), 20)

        def row() -> None:
            for _ in range(calls):
                work()
            torch.cuda.synchronize()

        return seconds(row) * 1e3 / calls

    def _why_not(self, work: Work, prepare: Prepare) -> str:
        """Why a call must not be captured: an attempt that fails leaves the allocator, and so the run, in pieces."""
        if prepare is not None:
            prepare()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        except Exception as failure:
            return f"waits for the device: {type(failure).__name__}"
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.synchronize()
        return ""

    def _replayed(self, work: Work, prepare: Prepare, repeats: int) -> tuple[float, str]:
        """(median of the replays of a graph of the call, ""), or (0, why there is none)."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            if prepare is not None:
                prepare()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            capture(graph, pool, work)
        except Exception as failure:
            if isinstance(failure, BrokenCapture):
                self._mend(pool)
            return 0.0, f"not captured: {str(failure).strip()[:120]}".splitlines()[0]
        try:
            times = self.turns({"": (graph.replay, prepare)}, repeats, self.until(float("inf")))[""]
        finally:
            torch.cuda.synchronize()
            graph.reset()
        return quantile(times, 0.5), ""

    def _mend(self, pool: Any) -> None:
        """After a capture that could not be ended: torch leaves its allocator and its generator as if it still ran.

        A graph whose capture ended gives its pool back itself, and must not find it given back.
        """
        device = torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        for step in (
            torch.cuda.synchronize,
            lambda: torch._C._cuda_endAllocateToPool(device, pool),
            lambda: torch._C._cuda_releasePool(device, pool),
            lambda: generator.graphsafe_set_state(generator.clone_state()),
        ):
            with suppress(Exception):
                step()
        try:
            torch.cuda.empty_cache()
            torch.randn(8, device=DEVICE)
            torch.cuda.synchronize()
        except Exception:
            self._no_capture = "not captured: an earlier capture failed and could not be undone"

    def scope(self) -> AbstractContextManager[object]:
        """The stream of this timer."""
        return torch.cuda.stream(self.stream)

    def clear(self) -> None:
        gc.collect()
        with suppress(Exception):  # where a capture could not be undone
            torch.cuda.empty_cache()


class BrokenCapture(RuntimeError):
    """A call cannot be captured, and torch could not end the capture; the message is what the call raised."""


def capture(graph: torch.cuda.CUDAGraph, pool: Any, work: Work) -> None:
    """Captures a call that has been made on the current stream before. Raises what the call raises, or BrokenCapture.

    torch.cuda.graph() would tell of the capture that ended instead, and leave it there.
    """
    graph.capture_begin(pool, capture_error_mode="thread_local")  # a backward runs in another thread
    try:
        work()
    except BaseException as failure:
        try:
            graph.capture_end()
        except Exception as broken:
            raise BrokenCapture(str(failure) or str(broken)) from failure
        raise
    try:
        graph.capture_end()
    except Exception as broken:
        raise BrokenCapture(str(broken)) from broken
