"""The device's part of a step, recorded once and replayed: a CUDA graph of the whole step of one rank (run.cuda_graph).

A step of a small model is thousands of kernels of a few microseconds each, which the host cannot issue as fast as the
device runs them. A graph is issued at once. What it costs: the memory of a step's activations is set apart for good,
and everything that changes from step to step must be in device memory before a replay: the tokens (fixed.py), one over
the valid tokens, the learning rate. The loss scale, the count of updates and whether one is skipped are there anyway
and change within the step.

The first steps of each shape run as they are: libraries set themselves up and kernels are compiled. Then one is
recorded, which runs nothing, and replayed from there on.

All work of the rank goes to one stream of its own, from the making of the parameters on: autograd adds gradients up on
the stream where a parameter's first gradient was asked for, and the default stream cannot be recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

from megapre.errors import UserError

WARMUP = 3

Results = TypeVar("Results", bound=NamedTuple)
Recorder = Callable[[Callable[[], Results]], tuple[Callable[[], None], Results]]
"""Of some work: what replays it, and the tensors (or None) where each replay leaves its results. It runs nothing."""


class GraphError(UserError):
    """The step cannot be recorded."""


class Recorded(Generic[Results]):
    """`work`, done as it is for its first WARMUP calls with inputs of some shapes and from a recording after that."""

    def __init__(self, work: Callable[[], Results], record: Recorder[Results]) -> None:
        self.work, self.record = work, record
        self.calls: Counter[object] = Counter()
        self.recordings: dict[object, tuple[Callable[[], None], Results]] = {}

    def __call__(self, shapes: object) -> Results:
        """One step; its results are tensors of their own. Raises GraphError."""
        self.calls[shapes] += 1
        if self.calls[shapes] <= WARMUP:
            return self.work()
        if shapes not in self.recordings:
            self.recordings[shapes] = self.record(self.work)
        replay, results = self.recordings[shapes]
        replay()
        return results._make(None if value is None else value.clone() for value in results)


def refusal(device: torch.device, world: int) -> str:
    """Why a step cannot be recorded there; empty where it can."""
    if device.type != "cuda":
        return f"run.cuda_graph: a graph of the step needs a CUDA device, this run is on the {device.type}"
    if world > 1:
        return (
            f"run.cuda_graph: a graph holds the step of one rank, and there are {world}: collectives and channels are "
            "paced by the host"
        )
    return ""


def own_stream(device: torch.device) -> None:
    """From here on this thread's work on `device` goes to a stream that can be recorded."""
    torch.cuda.set_stream(torch.cuda.Stream(device))


class CudaRecorder:
    """Records into CUDA graphs that share one pool of memory: one at a time is replayed."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the loader's thread may pin memory meanwhile.
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
                results = work()
        except RuntimeError as error:
            raise GraphError(
                f"run.cuda_graph: the step cannot be recorded ({error}). An implementation in [kernels] that waits for "
                "the device, or allocates through the driver, cannot be part of a graph: choose another, or set "
                "run.cuda_graph=false"
            ) from error
        return graph.replay, results
