"""Ranks that are threads of one process: cheap enough for hypothesis."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SECONDS = 180.0
"""After which a rank that waits gives up."""

Gather = Callable[[Tensor], "Arriving"]


class Arriving:
    """An all-gather under way; `wait` gives [R, ...]."""

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self.wait = wait


class Board:
    """An all-gather among threads: each posts what it has and waits until all have posted theirs."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.failed = ranks, False
        self.posted: dict[tuple[int, int], Tensor] = {}
        self.changed = threading.Condition()

    def gather(self, rank: int) -> Gather:
        calls = itertools.count()

        def gather(part: Tensor) -> Arriving:
            call = next(calls)
            with self.changed:
                self.posted[call, rank] = part.clone()
                self.changed.notify_all()
            return Arriving(lambda: self.collect(call))

        return gather

    def collect(self, call: int) -> Tensor:
        keys = [(call, rank) for rank in range(self.ranks)]
        with self.changed:
            done = self.changed.wait_for(lambda: self.failed or all(key in self.posted for key in keys), SECONDS)
        if self.failed or not done:
            raise RuntimeError(f"collective {call}: not every rank took part")
        return torch.stack([self.posted[key] for key in keys])

    def fail(self) -> None:
        with self.changed:
            self.failed = True
            self.changed.notify_all()


def run_threads(ranks: int, function: Callable[[int, Gather], T]) -> list[T]:
    """function(rank, gather) of every rank. The first failure ends all."""
    board = Board(ranks)

    def one(rank: int) -> T:
        try:
            return function(rank, board.gather(rank))
        except BaseException:
            board.fail()
            raise

    if ranks == 1:
        return [one(0)]
    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(one, rank) for rank in range(ranks)]
    # What the others say, once one has failed, says nothing.
    failures = [failure for future in futures if (failure := future.exception()) is not None]
    for failure in sorted(failures, key=lambda failure: "not every rank took part" in str(failure)):
        raise failure
    return [future.result() for future in futures]
