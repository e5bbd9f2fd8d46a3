"""Ranks as processes of this machine: started, listened to, and ended together.

What holds whatever happens:

first Ctrl-C, SIGTERM, SIGUSR2   passed on once to every rank, which saves and ends; SIGHUP is passed on as SIGTERM
a second one                     all ranks are killed
the first rank that fails        the others are told to end (SIGTERM); its last lines are shown last, its code is ours
a rank that cannot go on         what it says is shown once all have ended, for which they have the same time
ranks that do not end in time    are killed
the launcher is killed itself    the kernel kills the ranks (Linux: PR_SET_PDEATHSIG)

A rank leads a session of its own. So the terminal's Ctrl-C reaches the launcher alone, which passes it on, and what a
rank has started can be killed with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

from megapre.mesh import spans
from megapre.train.signals import EXIT_CODES

PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGHUP: signal.SIGTERM,
}
REFUSED = 2
"""Exit code of a rank for what the user can mend, which says itself what to do."""
STOPPED = tuple(EXIT_CODES.values())
"""Exit codes of a rank that ended because it was asked to."""
FAILURE_GRACE = 15.0
"""Seconds that ranks have to end after one has failed, or has said why it will: the others wait in vain, and cannot
save.
"""
TAIL = 30
"""Lines of the failed rank that are shown again at the end."""
ERROR = b"megapre: error: "
"""With which a rank begins to say what it cannot go on with (megapre.cli)."""
COLOURS = (36, 33, 32, 35, 34, 31, 96, 93, 92, 95, 94, 91)


class Rank:
    """One process, what it says, and the log in which all of that is kept."""

    def __init__(self, number: int, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> None:
        self.number = number
        self.log, self._logs = log, True
        self.tail: deque[bytes] = deque(maxlen=TAIL)
        self.error: list[bytes] = []  # what it cannot go on with, from its first line to all that came after
        self.code: int | None = None
        self._rest = b""
        self.process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_dies_with(os.getpid()),  # this process has one thread
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.output, False)

    def lines(self) -> list[bytes] | None:
        """The whole lines that have come since, logged; None at the end, when nothing comes any more. Lines of `error`
        are not among them: several ranks may have the same.
        """
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return []
        if not data and not self._rest:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n") if data else (self._rest, b"")
        self._keep(lines)
        self.tail.extend(lines)
        at = 0 if self.error else next((at for at, line in enumerate(lines) if line.startswith(ERROR)), len(lines))
        self.error += lines[at:]
        return lines[:at]

    def _keep(self, lines: list[bytes]) -> None:
        if self._logs and lines:
            try:
                self.log.write(b"".join(line + b"\n" for line in lines))
            except OSError as error:  # the disk is full: ranks go on without, and may still save elsewhere
                self._logs = False
                lines.append(f"megapre: the log {self.log.name} cannot be written any more: {error}".encode())

    def end(self, number: signal.Signals) -> None:
        """Signals the process, and with SIGKILL all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            elif self.code is None:
                os.kill(self.process.pid, number)

    def reap(self) -> int | None:
        """The exit code once the process has ended (128 + the signal it was killed by), else None."""
        if self.code is None and os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.end(signal.SIGKILL)  # before its number is free for others: what it has left behind
            code = self.process.wait()
            self.code = code if code >= 0 else 128 - code
        return self.code

    def outcome(self) -> str:
        assert self.code is not None, f"rank {self.number} still runs"
        if self.process.returncode < 0:
            return f"rank {self.number} was killed by {signal.Signals(-self.process.returncode).name}"
        return f"rank {self.number} ended with exit code {self.code}"


def alike(rank: Rank) -> bytes:
    """The error of a rank without what differs from rank to rank: its number, and the ports of its connections."""
    text = b"\n".join(rank.error).replace(b"error: rank %d: " % rank.number, b"error: ")
    return re.sub(rb"\]:\d+", b"]", text)


class Ranks:
    """All ranks of a run, from start to end. A context manager: whatever happens, none outlives it."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.ranks: list[Rank] = []
        self.ended: list[Rank] = []  # in the order of their ends
        self.failed: list[Rank] = []  # those that ended otherwise than by being done, or stopped, or ended by us
        self._signals: list[signal.Signals] = []
        self._sent: set[signal.Signals] = set()
        self._before: dict[signal.Signals, Any] = {}
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._exits: dict[Rank, int] = {}
        self._prints = True

    def __enter__(self) -> Self:
        for end in (self._wake, self._waker):
            end.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has its reasons
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for rank in self.ranks:
            if rank.code is None:
                rank.end(signal.SIGKILL)
                rank.process.wait()
            rank.process.stdout.close()  # type: ignore[union-attr]
        signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            signal.signal(number, before)
        for fd in self._exits.values():
            os.close(fd)
        self._selector.close()
        self._wake.close()
        self._waker.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(signal.Signals(number))

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> None:
        """Starts the next rank. Raises OSError where the command cannot be run."""
        rank = Rank(len(self.ranks), command, environment, log)
        self.ranks.append(rank)
        self._selector.register(rank.output, selectors.EVENT_READ, rank)
        with contextlib.suppress(OSError, AttributeError):  # before Linux 5.3; then ends are looked for now and then
            self._exits[rank] = os.pidfd_open(rank.process.pid)
            self._selector.register(self._exits[rank], selectors.EVENT_READ)

    def run(self) -> int:
        """Until all ranks have ended: shows what they say, passes signals on. Returns the exit code for all."""
        heard, told, refused, deadline = 0, False, False, float("inf")
        while len(self.ended) < len(self.ranks):
            self._listen(min(max(deadline - time.monotonic(), 0), 1.0 if self._exits else 0.05))
            now = time.monotonic()
            if len(self._signals) > heard:
                heard = self._pass_on()
                deadline = min(deadline, now + self.grace)
            if not told and self.failed:
                told = True
                deadline = min(deadline, now + FAILURE_GRACE)
                if not heard:
                    self._tell(signal.SIGTERM)
            elif deadline == float("inf") and any(rank.code for rank in self.ended):
                deadline = now + self.grace  # it was asked to stop, not by us, and so were the others
            if not refused and any(rank.error for rank in self.ranks):
                refused = True  # what it says is held back until all have ended, and must not be so for long
                deadline = min(deadline, now + FAILURE_GRACE)
            if now >= deadline:
                running = ", ".join(str(rank.number) for rank in self.ranks if rank.code is None)
                self._say(f"ranks that did not end in time are killed: {running}")
                self._tell(signal.SIGKILL)
                deadline = now + 60
        self._drain()
        killed = len(self._signals) > 1
        blamed = self._blamed if self.failed and not killed else None
        same = self._errors(blamed)
        if killed:
            return 128 + self._signals[-1]
        if blamed is not None:
            self._explain(blamed, same)
        code = next((rank.code for rank in [*self.failed, *self.ended] if rank.code), 0)
        asked = PASSED_ON[self._signals[0]] if self._signals else None
        if asked is not None and code == 128 + asked:  # the rank had only started, and nothing is lost
            return EXIT_CODES[asked]
        return code

    def _listen(self, seconds: float) -> None:
        """Waits for output, an end or a signal. epoll gives them in the order in which they came, and so do we: the
        first of several ranks to end is the one to blame.
        """
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._wake:
                with contextlib.suppress(BlockingIOError):
                    self._wake.recv(4096)
            elif isinstance(key.data, Rank):
                self._hear(key.data)
            else:
                rank = next(rank for rank, fd in self._exits.items() if fd == key.fileobj)
                self._selector.unregister(key.fileobj)
                self._look(rank)
        if len(self._exits) < len(self.ranks):
            for rank in self.ranks:
                self._look(rank)

    def _look(self, rank: Rank) -> None:
        if rank not in self.ended and (code := rank.reap()) is not None:
            self.ended.append(rank)
            if code not in {0, *STOPPED, *(128 + number for number in self._sent)}:
                self.failed.append(rank)

    def _hear(self, rank: Rank) -> bool:
        """Shows what the rank has said. False at the end of its pipe."""
        lines = rank.lines()
        for line in lines or ():
            self._print(rank, line)
        if lines is None:
            self._selector.unregister(rank.output)
        return lines is not None

    def _drain(self) -> None:
        """What ended ranks have left in their pipes. These end too, unless something has fled from its rank's group."""
        left = [key.data for key in self._selector.get_map().values() if isinstance(key.data, Rank)]
        end = time.monotonic() + 1
        while left and time.monotonic() < end:
            left = [rank for rank in left if self._hear(rank)]

    def _pass_on(self) -> int:
        """Acts on the last of the signals; returns how many had come. Another may come meanwhile: it is not counted."""
        come = len(self._signals)
        number = self._signals[come - 1]
        if come > 1:
            self._say(f"{number.name} again: ranks are killed")
            self._tell(signal.SIGKILL)
        else:
            self._say(f"{number.name}: passed on to all ranks, which save and end; once more to kill them")
            self._tell(PASSED_ON[number])
        return come

    def _tell(self, number: signal.Signals) -> None:
        self._sent.add(number)
        for rank in self.ranks:
            if rank.code is None:
                rank.end(number)

    @property
    def _blamed(self) -> Rank:
        """The first to fail; or where that has left it to another to say why, as megapre.cli does, the first to say."""
        first = self.failed[0]
        silent = first.code == REFUSED and not first.error
        return next((rank for rank in self.failed if rank.error), first) if silent else first

    def _errors(self, blamed: Rank | None) -> list[int]:
        """Shows each error once, with the ranks that have it, but for that of `blamed`, which comes last; returns the
        others that have that.
        """
        same: list[int] = []
        said: dict[bytes, list[Rank]] = {}
        for rank in self.ranks:
            if rank.error:
                said.setdefault(alike(rank), []).append(rank)
        for text, ranks in said.items():
            if blamed in ranks:
                same = [rank.number for rank in ranks if rank is not blamed]
                continue
            for line in text.split(b"\n"):
                self._print(ranks[0], line, spans([rank.number for rank in ranks]).partition(" ")[2])
        return same

    def _print(self, rank: Rank, line: bytes, numbers: str = "") -> None:
        """Of `rank`, or of all that `numbers` tells."""
        prefix = f"[{numbers or rank.number:>{len(str(len(self.ranks) - 1))}}]"
        if self._prints:
            try:
                if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
                    prefix = f"\x1b[{COLOURS[rank.number % len(COLOURS)]}m{prefix}\x1b[0m"
                print(prefix, line.decode(errors="replace").rstrip("\r"), flush=True)
            except OSError:  # `| head` has seen enough; the ranks go on, and their logs
                self._prints = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _explain(self, first: Rank, same: Sequence[int]) -> None:
        others = f", the first of {len(self.failed)} that failed" if len(self.failed) > 1 else ""
        too = f"; {spans(same)} said the same" if same else ""
        last = f"; its last lines, all of them in {first.log.name}:" if first.tail else ""
        self._say(f"{first.outcome()}{others}{too}{last}")
        with contextlib.suppress(OSError):
            for line in first.error or first.tail:
                print(line.decode(errors="replace"), file=sys.stderr, flush=True)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"megapre: {text}", file=sys.stderr, flush=True)


def launch(command: Sequence[str], nproc: int, logs: Path, grace: float, environment: Mapping[str, str]) -> int:
    """Runs `command` as `nproc` ranks and returns the exit code: 0, or that of the first rank that failed.

    Each rank gets `environment` with the variables that torchrun sets, and its output is appended to
    `logs`/rank0.out, ... Main thread only.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as open_, Ranks(grace) as ranks:
        port = free_port()
        for rank in range(nproc):
            log = open_.enter_context((logs / f"rank{rank}.out").open("ab", buffering=0))
            ranks.start(command, {**environment, **variables(rank, nproc, port)}, log)
        return ranks.run()


def variables(rank: int, nproc: int, port: int) -> dict[str, str]:
    """What torchrun tells rank `rank` of one machine."""
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _dies_with(launcher: int) -> Any:
    """For a child to run between fork and exec: the kernel shall kill it when `launcher` has ended. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # it had ended before
            os._exit(1)

    return ask
