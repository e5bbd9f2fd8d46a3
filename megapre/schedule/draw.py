"""Timelines as text, as wide as a terminal.

A line for each rank has the letter of an action and dashes for as long as it takes, or dots where the rank is idle; the
line below it has the micro-batches. With two chunks a rank, letters of the second are small; with more, a third line
has the chunks. What is too long for the width is sampled: each column has the letter of what runs at its middle.
"""

import textwrap
from bisect import bisect_right
from collections.abc import Iterator
from itertools import groupby

from .simulate import Timeline

COLOURS = {"F": (75, 153), "B": (78, 151), "I": (80, 159), "W": (214, 223)}
"""Of a terminal's 256, by kind, for even and odd chunks."""
WIDEST = 4
"""Columns that the shortest action has at most."""


def draw(timeline: Timeline, width: int = 100, colour: bool = False) -> str:
    """The timeline in lines of at most `width` characters. `colour` paints the actions, for a terminal."""
    schedule, makespan = timeline.schedule, timeline.makespan
    margin = len(f"rank {schedule.ranks - 1}  ")
    room = max(width - margin, 10)
    shortest = min((end - start for start, end in _intervals(timeline) if end > start), default=0.0)
    if not shortest:
        return "nothing takes time"
    columns = min(WIDEST, int(room * shortest / makespan * (1 + 1e-9)))
    scale = columns / shortest if columns else room / makespan
    lines = []
    for rank in range(schedule.ranks):
        cells = _cells(timeline, rank, scale)
        rows = _painted(timeline, rank, cells, columns > 0) if colour else _plain(timeline, rank, cells, columns > 0)
        lines += [f"{f'rank {rank}' if k == 0 else '':<{margin}}{row}".rstrip() for k, row in enumerate(rows)]
    legend = _legend(timeline, 1 / scale, colour, columns > 0)
    return "\n".join([*lines, "", *([legend] if colour else textwrap.wrap(legend, width))])


def summary(timeline: Timeline) -> str:
    """Sizes, bubble and in-flight activations in a line."""
    schedule = timeline.schedule
    chunks = f" x {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    most = max(timeline.in_flight)
    worth = f" ({most / schedule.chunks:g} micro-batches' worth)" if schedule.chunks > 1 else ""
    return (
        f"{schedule.name}: {schedule.ranks} rank{'s' if schedule.ranks > 1 else ''}{chunks}, {schedule.micro_batches} "
        f"micro-batch{'es' if schedule.micro_batches > 1 else ''}: takes {timeline.makespan:.4g}, bubble "
        f"{timeline.bubble:.1%}, idle {timeline.idle:.1%}, at most {most} activations in flight{worth}"
    )


def _intervals(timeline: Timeline) -> Iterator[tuple[float, float]]:
    for starts, ends in zip(timeline.starts, timeline.ends, strict=True):
        yield from zip(starts, ends, strict=True)


def _cells(timeline: Timeline, rank: int, scale: float) -> list[int | None]:
    """For each column the action, by its place in the rank's program, that runs at the column's middle."""
    starts, ends = timeline.starts[rank], timeline.ends[rank]
    cells: list[int | None] = []
    for column in range(round(timeline.makespan * scale)):
        time = (column + 0.5) / scale
        at = bisect_right(starts, time) - 1
        cells.append(at if at >= 0 and time < ends[at] else None)
    return cells


def _plain(timeline: Timeline, rank: int, cells: list[int | None], whole: bool) -> list[str]:
    letters, numbers, chunks = "", "", ""
    many = timeline.schedule.chunks > 2
    for at, run in groupby(cells):
        size = len(list(run))
        if at is None:
            letters, numbers, chunks = letters + "." * size, numbers + " " * size, chunks + " " * size
            continue
        kind, chunk, i = timeline.schedule[rank][at]
        letter = kind.lower() if chunk == 1 and not many else kind
        letters += letter + "-" * (size - 1) if whole else letter * size
        numbers += f"{str(i)[-size:]:<{size}}"
        chunks += f"{str(chunk)[-size:]:<{size}}"
    if not whole:
        return [letters]
    return [letters, numbers, *([chunks] if many else []), *([""] if rank < timeline.schedule.ranks - 1 else [])]


def _painted(timeline: Timeline, rank: int, cells: list[int | None], whole: bool) -> list[str]:
    line = ""
    for at, run in groupby(cells):
        size = len(list(run))
        if at is None:
            line += " " * size
            continue
        kind, chunk, i = timeline.schedule[rank][at]
        text = f"{str(i)[-size:]:<{size}}" if whole else " " * size
        line += _paint(text, kind, chunk)
    return [line]


def _paint(text: str, kind: str, chunk: int) -> str:
    return f"\x1b[38;5;16;48;5;{COLOURS[kind][chunk % 2]}m{text}\x1b[0m"


def _legend(timeline: Timeline, unit: float, colour: bool, whole: bool) -> str:
    names = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradient of the weights"}
    used = {action.kind for program in timeline.schedule for action in program}
    kinds = [
        f"{_paint(f' {kind} ', kind, 0)} {name}" if colour else f"{kind} {name}"
        for kind, name in names.items()
        if kind in used
    ]
    below = ""
    if whole and not colour:
        below = {1: "; below, the micro-batch", 2: "; below, the micro-batch; small letters: chunk 1"}.get(
            timeline.schedule.chunks, "; below, the micro-batch and the chunk"
        )
    return f"{', '.join(kinds)}{'' if colour else ', . idle'}{below}; a column is {unit:.4g}"
