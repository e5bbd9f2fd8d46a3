"""Stopping on request, between two steps and with a checkpoint.

first Ctrl-C (SIGINT)            finish the step, save, exit 130
first SIGTERM or SIGUSR2         finish the step, save, exit 75: "requeue me" (sysexits.h EX_TEMPFAIL)
a second of any of them          the process ends at once; nothing half-written counts as a checkpoint
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR2: 75}


class StopRequest:
    """While entered, notes the first of the signals instead of dying of it. Main thread only, as all such handling."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # The default action needs no interpreter: a second signal ends the process even inside a long operation.
        for other in EXIT_CODES:
            signal.signal(other, signal.SIG_DFL)
        message = f"\nmegapre: {self.signal.name}: finishing the step and saving; once more to stop at once\n"
        with contextlib.suppress(OSError):  # a closed stderr must not turn the request into a crash
            os.write(2, message.encode())
