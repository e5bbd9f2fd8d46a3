"""The device a run computes on: choice, settings, clock and memory gauge."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megapre.errors import UserError

from . import cpu_runtime

if TYPE_CHECKING:
    from megapre.config import Run
    from megapre.parallel.comm import Place

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class DeviceError(UserError):
    """The asked-for device is not there."""


def prepare(run: Run, here: Place | None = None) -> torch.device:
    """Chooses the device and applies threads, keep_memory, deterministic and seed of `run`. A rank takes the device of
    its number on the machine. Raises DeviceError.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"run.device = cuda, but torch {torch.__version__} sees no CUDA device; set run.device=cpu or auto"
        )
    kind = "cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu"
    cpu_runtime.set_threads(run.threads)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(run.seed)
    if kind == "cpu":
        if run.keep_memory:
            cpu_runtime.keep_freed_memory()
        return torch.device("cpu")
    if here is not None and here.world > 1:
        if here.local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"rank {here.rank} is number {here.local_rank} of {here.local_world} ranks on its machine, but torch "
                f"sees {torch.cuda.device_count()} CUDA devices; start no more ranks there, or set run.device=cpu"
            )
        torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", torch.cuda.current_device())


Mark = float | torch.cuda.Event


def now(device: torch.device) -> Mark:
    """A point in the device's time, without waiting for it: on CUDA an event in the current stream."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin: Mark, end: Mark) -> float:
    """Time from `begin` to `end`; on CUDA this waits until the device has passed `end`."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float), "marks of two devices"
        return end - begin
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Told:
    """Numbers on their way from a device to the host. Reading them waits until they are there, and for nothing that
    the device does later."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers, self.arrived = numbers, None
        if numbers.device.type == "cuda":
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.flatten().tolist()  # type: ignore[no-any-return]


def peak_memory(device: torch.device) -> int:
    """Bytes: torch's peak allocation on CUDA, the peak resident set of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> str:
    """The device's own name, such as `NVIDIA H200` or `AMD EPYC`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform.startswith("linux") else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_size(device: torch.device) -> int:
    """Bytes of memory that the device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
