"""Shards encoded by several processes, in the order of the shards.

Each worker has a pipe of its own and one shard at a time. A worker that dies closes its pipe, wherever it was, so a
loss is always noticed; concurrent.futures can wait for ever where a process dies while another is being started.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

from .errors import DataError
from .progress import Progress
from .shards import Manifest, Options, Shard, Stopped, encode
from .tokenizer import Tokenizer, load_tokenizer


def encode_in_order(
    shards: Sequence[Shard], folder: Path, options: Options, tokenizer: str, processes: int, bar: Progress
) -> Generator[Manifest, None, None]:
    """The manifests of all shards, in order, made by so many processes.

    Raises what the first shard that failed did, whichever failed before it; DataError where a process died. Closing the
    generator stops the processes within a moment.
    """
    # Spawned, not forked: a fork copies the locks of the libraries' threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    read, stop = context.Value("q", 0), context.Event()
    waiting = deque(enumerate(shards))
    busy: dict[Connection, int] = {}
    made: dict[int, Manifest | Exception] = {}
    pipes, workers = [], []
    # Ctrl-C goes to every process of the terminal: the workers leave it to this one, from their first moment on.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, folder, options, tokenizer, read, stop), daemon=True)
            pipes.append(ours)
            worker.start()
            workers.append(worker)
            theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for pipe in pipes:
            _give(pipe, waiting, busy)
        for number in range(len(shards)):
            while number not in made:
                ready = wait(list(busy), timeout=0.2)
                for pipe in [pipe for pipe in busy if pipe in ready]:
                    made[busy.pop(pipe)] = pipe.recv()
                    _give(pipe, waiting, busy)
                bar.move_to(read.value)
            outcome = made.pop(number)
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    except (EOFError, ConnectionError):
        raise DataError(
            "a worker died, most likely for want of memory; start again with fewer --workers, finished shards are kept"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        stop.set()
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join()


def _give(pipe: Connection, waiting: "deque[tuple[int, Shard]]", busy: dict[Connection, int]) -> None:
    if waiting:
        number, shard = waiting.popleft()
        pipe.send(shard)
        busy[pipe] = number


def _work(
    pipe: Connection, folder: Path, options: Options, tokenizer: str, read: "Synchronized[int]", stop: Event
) -> None:
    """A worker's life: shards in, manifests or what went wrong out, until the pipe is closed."""

    def report(count: int) -> None:
        with read.get_lock():
            read.value += count
        if stop.is_set():
            raise Stopped

    try:
        loaded: Tokenizer | None = None
        while True:
            shard: Shard = pipe.recv()
            try:
                loaded = loaded or load_tokenizer(tokenizer)
                outcome: Manifest | Exception = encode(shard, folder, options, loaded, report)
            except Stopped:
                raise
            except (OSError, DataError) as error:
                outcome = error
            except Exception as error:  # of any other type: it may not survive the pipe, its text does
                outcome = DataError(f"{shard.parts[0].path}: {type(error).__name__}: {error}")
            pipe.send(outcome)
    except (EOFError, ConnectionError, Stopped):
        pass
