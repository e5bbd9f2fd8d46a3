"""A GPU made up of a clock and a log: what runs there runs after what was enqueued before it.

It stands in for torch.cuda where the timer of benchmarks is tested without a GPU: what is called, in which order, on
which stream; what may not happen while a graph is captured raises as on a GPU.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megapre.kernels.bench import cuda_timer


class Device:
    """`log` is what was called; `at` the second at which the device will be idle; `slept` the sleeps enqueued."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.at, self.slept = 0.0, []
        self.stream: Any = "default"
        self.capturing: Any = None
        self.broken = False  # a capture failed, and torch still believes in it
        self.mendable = True
        self.debug = 0
        self.released = 0  # pools of graphs that could not give them back
        self.held = 0

    def run(self, seconds: float, name: str = "work") -> None:
        """Enqueues work, or captures it."""
        self.log.append(name)
        if self.capturing is not None:
            self.capturing.seconds += seconds
            return
        self.at = max(self.at, time.perf_counter()) + seconds

    def wait(self) -> None:
        """As tensor.item()."""
        if self.capturing is not None:
            self.capturing.spoilt = True
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.debug:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.log.append("waited")
        time.sleep(max(self.at - time.perf_counter(), 0.0))

    def synchronize(self) -> None:
        assert self.capturing is None, "nothing waits for the device while a graph is captured"
        self.log.append("synchronize")
        time.sleep(max(self.at - time.perf_counter(), 0.0))

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.slept.append(cycles / cuda_timer.CYCLES_PER_S)
        self.at = max(self.at, time.perf_counter()) + self.slept[-1]

    def empty_cache(self) -> None:
        assert self.capturing is None
        if self.broken:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before


class Event:
    def __init__(self, device: Device, enable_timing: bool) -> None:
        assert enable_timing
        self.device = device

    def record(self) -> None:
        self.device.log.append("record")
        self.at = self.device.at = max(self.device.at, time.perf_counter()) + 1e-6

    def query(self) -> bool:
        return time.perf_counter() >= self.at

    def synchronize(self) -> None:
        self.device.log.append("event.synchronize")
        time.sleep(max(self.at - time.perf_counter(), 0.0))

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1e3


class Graph:
    def __init__(self, device: Device) -> None:
        self.device, self.seconds, self.spoilt, self.whole = device, 0.0, False, False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        assert self.device.stream != "default", "the default stream cannot be captured"
        assert capture_error_mode == "thread_local"
        self.device.log.append("capture_begin")
        self.device.capturing = self

    def capture_end(self) -> None:
        self.device.log.append("capture_end")
        self.device.capturing = None
        if self.spoilt:
            self.device.broken = True
            raise RuntimeError("operation failed due to a previous error during capture")
        self.whole = True

    def replay(self) -> None:
        assert self.whole
        self.device.run(self.seconds, "replay")

    def reset(self) -> None:
        self.device.log.append("reset")


class Generator:
    def clone_state(self) -> "Generator":
        return self

    def graphsafe_set_state(self, state: "Generator") -> None:
        pass


class Flush:
    def __init__(self, device: Device) -> None:
        self.device = device

    def zero_(self) -> None:
        self.device.run(0.0, "flush")


def install(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    def ended(index: int, pool: tuple[int, int]) -> None:
        assert (index, pool) == (0, (0, 7))
        device.broken = device.broken and not device.mendable

    def say(mode: Any) -> None:
        device.debug = 1 if mode == "error" else 0

    replaced: dict[str, Any] = {
        "Event": lambda enable_timing: Event(device, enable_timing),
        "CUDAGraph": lambda: Graph(device),
        "Stream": lambda: "side",
        "stream": device.on,
        "_sleep": device.sleep,
        "synchronize": device.synchronize,
        "empty_cache": device.empty_cache,
        "graph_pool_handle": lambda: (0, 7),
        "current_device": lambda: 0,
        "default_generators": [Generator()],
        "get_sync_debug_mode": lambda: device.debug,
        "set_sync_debug_mode": say,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: device.held,
        "max_memory_allocated": lambda: device.held + 3 * 2**20,
    }
    for name, fake in replaced.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def released(index: int, pool: tuple[int, int]) -> None:
        device.released += 1

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", released, raising=False)
    monkeypatch.setattr(cuda_timer, "DEVICE", "cpu")
    return device


def timer(device: Device) -> cuda_timer.CudaTimer:
    made = cuda_timer.CudaTimer()
    made._flush = Flush(device)  # type: ignore[assignment]
    return made
