"""A schedule that the user wrote is part of the run: its copy in the run folder, and what has become of it since.

The copy's name holds a digest of its text, schedule-3fa2b1c4.txt. So a run that went on with another schedule keeps
both, each config.toml names its own, and a copy that was edited is noticed.
"""

from __future__ import annotations

import hashlib
import re
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from megapre.data.atomic import write_whole
from megapre.schedule import BUILDERS, ScheduleError, read

if TYPE_CHECKING:
    from megapre.config import Config


def keep(cfg: Config, folder: Path) -> Config:
    """Copies the schedule's file into `folder`; the config then names the copy, as a file beside its own.

    Raises ScheduleError where it cannot be read, OSError where the copy cannot be written.
    """
    if cfg.layout.schedule in BUILDERS:
        return cfg
    content = _content(cfg.layout.schedule)
    copy = folder / f"schedule-{_digest(content)}.txt"
    write_whole(copy, content)
    return cfg.model_copy(update={"layout": cfg.layout.model_copy(update={"schedule": copy.name})})


def difference(before: str, now: str) -> str:
    """In words and numbers, what has changed from the schedule of a run (its copy) to the one it is to go on with.

    Empty where the tables are equal, whatever the files are called. Raises ScheduleError where `now` cannot be read.
    """
    if before in BUILDERS or now in BUILDERS:
        return "" if before == now else f"{before} -> {now}"
    try:
        content, then = _content(before), read(before)
    except ScheduleError as error:
        return f"{before} -> {now} (the copy in the run folder cannot be compared: {error})"
    # A run of before there were copies has none.
    copied = re.fullmatch(r"schedule-([0-9a-f]{8})\.txt", Path(before).name)
    if copied and copied[1] != (found := _digest(content)):
        return f"{before} -> {now} (the copy in the run folder was edited: sha256 {copied[1]} -> {found})"
    table = read(now)
    if (then.chunks, then.placement, then.programs) == (table.chunks, table.placement, table.programs):
        return ""
    pairs = [pair for rows in zip_longest(then, table, fillvalue=()) for pair in zip_longest(*rows)]
    differ = sum(old != new for old, new in pairs)
    return f"{before} -> {now} ({differ:,} of {len(pairs):,} actions differ)"


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ScheduleError(f"schedule {path}: {error.strerror or error}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
