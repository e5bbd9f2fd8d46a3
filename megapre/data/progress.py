"""How far a long reading of files has come: a bar with its end in sight on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

BETWEEN = 10.0  # seconds between two lines of a log


class Progress:
    """Bytes read of `total`, written to stderr; silent unless `shown`."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total = total
        self._read = 0
        self._started = self._told = time.monotonic()
        self._shown = shown
        self._bar: Bar | None = None
        if shown and sys.stderr.isatty():
            self._bar = _rich_bar()
            self._task = self._bar.add_task("tokenizing", total=total)

    def advance(self, count: int) -> None:
        """So many bytes more."""
        self.move_to(self._read + count)

    def move_to(self, read: int) -> None:
        """So many bytes in all."""
        self._read = read
        if self._bar is not None:
            self._bar.update(self._task, completed=read)
        elif self._shown and (now := time.monotonic()) - self._told >= BETWEEN:
            self._told = now
            rate = read / (now - self._started)
            left = f"{(self._total - read) / rate:.0f} s left" if rate else "stalled"
            share = 100 * read / max(self._total, 1)
            print(f"tokenizing {share:.0f}%, {rate / 1e6:.1f} MB/s, {left}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rich_bar() -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=Console(stderr=True))
