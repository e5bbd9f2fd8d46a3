"""Stopping on request, between two steps and with a checkpoint.

first Ctrl-C (SIGINT)            finish the step, save, exit 130
first SIGTERM or SIGUSR2         finish the step, save, exit 75: "requeue me" (sysexits.h EX_TEMPFAIL)
a second of any of them          the process ends at once; nothing half-written counts as a checkpoint

Of several ranks some may be asked and others not, or in the middle of another step. So a rank says with each step
whether it has been asked, in the collective that sums up the loss. On the CPU its sum is there when the step ends, and
all stop after the first step that began with a rank asked. A CUDA device may still be at it, and the host ahead: there
all stop after the step that follows, when the sum is there and nobody waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import Tensor

    from .machine import Told

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


class Vote:
    """What the ranks together make of their stop requests, of which `request` is this one's."""

    def __init__(self, request: StopRequest, world: int) -> None:
        self.request, self.world = request, world
        self.signal: signal.Signals | None = None
        self._before: Told | None = None

    @property
    def asked(self) -> bool:
        return self.request.signal is not None

    def passed(self, stops: Tensor | None = None) -> bool:
        """Whether to stop now, the same on all ranks. `stops`: how many of them were asked before the step just made.

        Afterwards `signal` is that of this rank, and SIGTERM on one that was not asked.
        """
        if self.world == 1:
            self.signal = self.request.signal
            return self.asked
        from .machine import Told  # torch, which signals alone must not need

        told, self._before = self._before, None if stops is None else Told(stops)
        if stops is not None and stops.device.type == "cpu":
            told = self._before
        if told is None or not any(told.read()):  # on CUDA of the step before the last, which is behind the device
            return False
        self.signal = self.request.signal or signal.SIGTERM
        return True
