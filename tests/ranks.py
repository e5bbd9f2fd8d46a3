"""Real ranks for tests: processes that live for the whole session and talk over gloo.

Starting a process that has torch takes seconds, so up to MOST workers are forked once, from a server that has imported
everything, and kept. A run lends n of them a process group of its own. A run that fails in any way costs its workers,
which are killed and replaced: no test inherits the wreck of another one.

A test takes the fixture `run_on`:

    def total(x: float) -> float:
        tensor = torch.tensor(x + dist.get_rank())
        dist.all_reduce(tensor)
        return tensor.item()

    def test_total(run_on: RunOn) -> None:
        assert run_on(4, total, 0.5) == [8.0, 8.0, 8.0, 8.0]
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

MOST = 8
SETTLE = 0.3  # seconds: how long after a first failure an earlier cause, such as a killed peer, may still come to light
PRELOAD = ["torch", "torch.distributed", "pytest", "hypothesis", "megapre.train.step"]


class RankError(Exception):
    """A run did not succeed on every rank. `ranks` are those to blame, `killed` says that they are gone."""

    def __init__(self, ranks: Sequence[int], message: str) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class RunOn(Protocol):
    """What the fixture `run_on` gives: `Pool.run_on`."""

    def __call__(self, n: int, function: Callable[..., Any], *args: Any, timeout: float = ...) -> list[Any]: ...


class Task(NamedTuple):
    """What a worker needs to be rank `rank` of `world`. `call` is the pickled (function, args)."""

    rank: int
    world: int
    store: str
    timeout: float
    path: list[str]
    call: bytes


class Answer(NamedTuple):
    """The pickled result of a rank, or the traceback of its error; `when` it was there, on the machine's clock."""

    result: bytes
    error: str
    when: float


class Pool:
    """Up to MOST worker processes. Leaving it (it is a context manager) ends them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._workers: list[Worker] = []
        self._started = self._runs = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._discard(self._workers)
        self._folder.cleanup()

    def run_on(self, n: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """`function(*args)` on n ranks, each within a fresh default process group; returns their results by rank.

        The function, its arguments and results must be picklable: a function at the top of a module. Raises RankError
        with the traceback of the rank that failed first, with the exit code of one that died, or, after `timeout`
        seconds, with the stack of every rank that did not answer.
        """
        if not 1 <= n <= MOST:
            raise ValueError(f"run_on: n = {n} ranks; there are 1 to {MOST}")
        call = pickle.dumps((function, args))
        self._discard([worker for worker in self._workers if worker.connection.poll()])  # the end of its pipe
        while len(self._workers) < n:
            self._started += 1
            self._workers.append(Worker(self._context, Path(self._folder.name) / f"stack{self._started}"))
        workers = self._workers[:n]
        self._runs += 1
        store = str(Path(self._folder.name) / f"store{self._runs}")
        try:
            for rank, worker in enumerate(workers):
                worker.connection.send(Task(rank, n, store, timeout, sys.path, call))
            results = [pickle.loads(answer.result) for answer in _collect(workers, time.monotonic() + timeout)]
            for worker in workers:
                worker.connection.send(None)  # every rank has answered: the process group may go
        except BaseException:
            self._discard(workers)
            raise
        return results

    def _discard(self, workers: Sequence["Worker"]) -> None:
        gone = list(workers)
        self._workers = [worker for worker in self._workers if worker not in gone]
        for worker in gone:
            worker.process.kill()
        for worker in gone:
            worker.process.join()
            worker.connection.close()


class Worker:
    """One process and our end of the pipe to it; `stack` is the file into which SIGUSR1 makes it write its stack."""

    def __init__(self, context: Any, stack: Path) -> None:
        self.stack = stack
        self.connection, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, str(stack)), daemon=True)
        self.process.start()
        far.close()  # so that the end of the process is the end of the pipe


def _collect(workers: Sequence[Worker], deadline: float) -> list[Answer]:
    """The answers by rank. Raises RankError."""
    world = len(workers)
    pending: dict[Any, int] = {worker.connection: rank for rank, worker in enumerate(workers)}
    answers: dict[int, Answer] = {}
    dead: dict[int, int | None] = {}
    while pending and (ready := wait(list(pending), max(deadline - time.monotonic(), 0))):
        for connection in ready:
            rank = pending.pop(connection)
            try:
                answers[rank] = workers[rank].connection.recv()
            except (EOFError, ConnectionResetError):
                workers[rank].process.join()
                dead[rank] = workers[rank].process.exitcode
        if dead or any(answer.error for answer in answers.values()):
            deadline = min(deadline, time.monotonic() + SETTLE)
    if dead:
        lines = [f"rank {rank} of {world} died, exit code {code}" for rank, code in sorted(dead.items())]
        raise RankError(sorted(dead), "; ".join(lines))
    failed = [rank for rank, answer in answers.items() if answer.error]
    if failed:
        first = min(failed, key=lambda rank: answers[rank].when)
        raise RankError([first], f"rank {first} of {world} failed:\n{answers[first].error}")
    if pending:
        silent = sorted(pending.values())
        stacks = [f"rank {rank}:\n{_stack(workers[rank])}" for rank in silent]
        names = ", ".join(map(str, silent))
        raise RankError(silent, f"of {world} ranks these did not answer in time: {names}\n" + "\n".join(stacks))
    return [answers[rank] for rank in range(world)]


def _stack(worker: Worker) -> str:
    """Where every thread of a hanging worker is. The handler is in C: it runs even inside a blocking collective."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.process.pid, signal.SIGUSR1)
    end = time.monotonic() + 5
    size = -1
    while time.monotonic() < end and (size <= 0 or worker.stack.stat().st_size != size):
        size = worker.stack.stat().st_size if worker.stack.exists() else 0
        time.sleep(0.05)
    return worker.stack.read_text() if worker.stack.exists() else "(it has not even begun)"


def _serve(connection: Connection, stack: str) -> None:
    """A worker's life: a task, its answer, the word that all have answered; until the pipe is closed."""
    import torch

    threading.Thread(target=_end_with_the_session, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the session, which then ends us
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of the machine need not resolve
    with open(stack, "w") as file, contextlib.suppress(EOFError):
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        while True:
            connection.send(_carry_out(connection.recv()))
            connection.recv()
            _leave()


def _end_with_the_session() -> None:
    """Even if it is killed, and even while this rank hangs. (The fork server does not end: it waits for its ranks.)"""
    session = multiprocessing.parent_process()
    assert session is not None
    wait([session.sentinel])
    os._exit(1)


def _carry_out(task: Task) -> Answer:
    import torch
    import torch.distributed as dist

    try:
        sys.path[:] = task.path
        function, args = pickle.loads(task.call)
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(task.store, task.world),
            rank=task.rank,
            world_size=task.world,
            timeout=timedelta(seconds=task.timeout + 60),  # it is the pool that speaks of a hang
        )
        result, error = pickle.dumps(function(*args)), ""
    except BaseException:
        result, error = b"", traceback.format_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return Answer(result, error, time.monotonic())


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
