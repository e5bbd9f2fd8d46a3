"""Where a run's lines go: the terminal with a progress bar under them, or plainly into a pipe; and always the log."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Screen:
    """Prints to standard output, unless `prints` is False, and appends to `log`. On a terminal a bar shows how far the
    run is.

    Nothing that is said can end a run: where one of the two cannot be written any more, the other goes on.
    """

    def __init__(self, log: Path, prints: bool = True) -> None:
        self._log: IO[str] = log.open("a", encoding="utf-8")
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._prints, self._logs = prints, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.finish()
        with suppress(OSError):
            self._log.close()

    def begin(self, done: int, steps: int) -> None:
        """Shows the bar, if there is a terminal to show it on."""
        if not self._prints or not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        self._bar = Progress(*columns, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("steps", total=steps, completed=done)
        self._bar.start()

    def advance(self, done: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def say(self, text: str) -> None:
        if self._prints:
            self._print(text)
        if not self._logs:
            return
        try:
            self._log.write(text + "\n")
            self._log.flush()
        except OSError as error:
            self._logs = False
            if self._prints:
                self._print(f"megapre: the log {self._log.name} cannot be written any more: {error}")

    def finish(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(OSError):
                bar.stop()

    def _print(self, text: str) -> None:
        try:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)
        except OSError:  # the pipe's reader has gone, the disk is full
            self._prints = False
            self.finish()
            # What is left in the buffer would fail again when the interpreter exits, and spoil the exit code.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, sys.stdout.fileno())
                os.close(nowhere)
