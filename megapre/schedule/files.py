"""Schedules as text files, to write by hand and to keep.

    # one forward, one backward, on two ranks
    name: mine
    chunks: 1
    micro-batches: 2
    placement: loop
    rank 0: F0.0 F1.0 B0.0 B1.0
    rank 1: F0.0 B0.0
      F1.0 B1.0

F3.1 is the forward of micro-batch 3 through chunk 1 of the rank; B, I and W are backwards (see actions.py). A line that
begins with a space goes on with the line before; # begins a comment. `placement` is loop unless given.
"""

import re
import textwrap
from pathlib import Path
from typing import get_args

from .actions import Action, Placement, Programs, Schedule, ScheduleError

ACTION = re.compile(r"([FBIW])(\d+)\.(\d+)")
LINE = re.compile(r"(name|chunks|micro-batches|placement|rank \d+)\s*:\s*(.*)")
KEYS = "name, chunks, micro-batches, placement, rank 0, rank 1, ..."
WIDTH = 120


def write(schedule: Schedule, path: str | Path) -> None:
    """Writes the schedule, so that `read` gives it back."""
    Path(path).write_text(as_text(schedule), encoding="utf-8")


def as_text(schedule: Schedule) -> str:
    lines = [
        f"name: {schedule.name}",
        f"chunks: {schedule.chunks}",
        f"micro-batches: {schedule.micro_batches}",
        f"placement: {schedule.placement}",
    ]
    for rank, program in enumerate(schedule):
        text = f"rank {rank}: {' '.join(map(str, program))}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def read(path: str | Path) -> Schedule:
    """The schedule in a file. It is not checked. Raises ScheduleError with the line of what cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ScheduleError(f"schedule {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ScheduleError(f"schedule {path}: byte {error.start} is not UTF-8 text") from None
    return from_text(text, str(path))


def from_text(text: str, source: str = "schedule") -> Schedule:
    """The schedule that `text`, which errors call `source`, holds."""
    found: dict[str, tuple[int, str]] = {}
    last = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#")[0].rstrip()
        if not line:
            continue
        if line[0].isspace() and last:
            found[last] = (found[last][0], f"{found[last][1]} {line.strip()}")
            continue
        match = LINE.fullmatch(line)
        if not match:
            raise ScheduleError(f"{source}, line {number}: {line[:40]!r} is none of KEY: VALUE with the keys {KEYS}")
        last = " ".join(match[1].split())
        if last in found:
            raise ScheduleError(f"{source}, line {number}: {last!r} was given on line {found[last][0]} already")
        found[last] = (number, match[2])
    programs = _programs(found, source)
    placement = found.get("placement", (0, "loop"))
    if placement[1] not in get_args(Placement):
        raise ScheduleError(f"{source}, line {placement[0]}: placement {placement[1]!r} is none of loop, v")
    name = found.get("name", (0, Path(source).stem))[1]
    placed: Placement = "v" if placement[1] == "v" else "loop"
    return Schedule(name, _size(found, "chunks", source), _size(found, "micro-batches", source), programs, placed)


def _size(found: dict[str, tuple[int, str]], key: str, source: str) -> int:
    if key not in found:
        raise ScheduleError(f"{source}: no line '{key}: NUMBER'")
    number, value = found[key]
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise ScheduleError(f"{source}, line {number}: {key} = {value!r} is not a whole number of at least 1")
    return int(value)


def _programs(found: dict[str, tuple[int, str]], source: str) -> Programs:
    ranks = {int(key.split()[1]): value for key, value in found.items() if key.startswith("rank ")}
    if not ranks:
        raise ScheduleError(f"{source}: no line 'rank 0: ACTIONS'")
    absent = sorted(set(range(max(ranks) + 1)) - ranks.keys())
    if absent:
        raise ScheduleError(f"{source}: there is a rank {max(ranks)}, but no line 'rank {absent[0]}: ACTIONS'")
    return tuple(
        tuple(_action(word, f"{source}, line {number}") for word in line.split())
        for _, (number, line) in sorted(ranks.items())
    )


def _action(word: str, where: str) -> Action:
    match = ACTION.fullmatch(word)
    if not match:
        raise ScheduleError(f"{where}: {word!r} is no action; write F, B, I or W, micro-batch, dot, chunk: F3.1")
    return Action(match[1], int(match[3]), int(match[2]))  # type: ignore[arg-type]
