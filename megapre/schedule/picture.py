"""Timelines as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .draw import summary
from .simulate import Timeline

INK, FAINT, LINE = "#24292f", "#8c959f", "#d0d7de"
COLOURS = {
    "F": ("#54aeff", "#b6e3ff", "#80ccff", "#ddf4ff"),
    "B": ("#4ac26b", "#aceebb", "#6fdd8b", "#dafbe1"),
    "I": ("#3dbdb0", "#b0ebe4", "#76d6cc", "#dcf7f3"),
    "W": ("#fb8f44", "#ffd8b5", "#ffb77c", "#fff1e5"),
}
"""By kind, chunk by chunk."""
NAMES = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradient of the weights"}


WIDTH, ROW = 12.0, 0.34
"""Of the picture and of a rank, in inches."""


def write_picture(timelines: Mapping[str, Timeline], path: str | Path, unit: str = "") -> None:
    """Draws timelines of one schedule under each other, on one axis of time whose unit is `unit`, a row a rank.

    Such as {"measured": ..., "simulated": ...}; for a single one the name may be empty. Raises ImportError without
    matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    (schedule, *_) = (timeline.schedule for timeline in timelines.values())
    figure = Figure(figsize=(WIDTH, 0.5 + len(timelines) * (1 + ROW * schedule.ranks)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    longest = max(timeline.makespan for timeline in timelines.values())
    rows = figure.subplots(len(timelines), squeeze=False)[:, 0]
    for axes, (name, timeline) in zip(rows, timelines.items(), strict=True):
        _draw(axes, timeline, longest)
        axes.set_title(f"{name}: {summary(timeline)}" if name else summary(timeline), loc="left", fontsize=9, color=INK)
    rows[-1].set_xlabel(f"time{f' ({unit})' if unit else ''}; the numbers are micro-batches", fontsize=8, color=INK)
    chunk = (lambda c: f", chunk {c}") if schedule.chunks > 1 else (lambda c: "")
    used = {(action.kind, action.chunk) for program in schedule for action in program}
    patches = [
        Patch(color=COLOURS[kind][c % 4], label=f"{NAMES[kind]}{chunk(c)}")
        for kind, c in sorted(used, key=lambda pair: ("FBIW".index(pair[0]), pair[1]))[:8]
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)


def _draw(axes: Any, timeline: Timeline, longest: float) -> None:
    """A timeline on axes of matplotlib that reach to time `longest`."""
    from matplotlib.collections import PolyCollection

    schedule = timeline.schedule
    inches = (WIDTH - 1) / longest
    room = 0.075 * len(str(schedule.micro_batches - 1))
    boxes: list[list[tuple[float, float]]] = []
    colours: list[str] = []
    for rank, program in enumerate(schedule):
        for action, start, end in zip(program, timeline.starts[rank], timeline.ends[rank], strict=True):
            boxes.append([(start, rank - 0.45), (end, rank - 0.45), (end, rank + 0.45), (start, rank + 0.45)])
            shades = COLOURS[action.kind]
            colours.append(shades[action.chunk % len(shades)])
            if (end - start) * inches > room:
                axes.text(
                    (start + end) / 2, rank, str(action.micro_batch), fontsize=7, color=INK, ha="center", va="center"
                )
    thin = 0.4 if len(boxes) < 2000 else 0.0
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="white", linewidths=thin))
    axes.set_xlim(0, longest)
    axes.set_ylim(schedule.ranks - 0.45, -0.55)
    axes.set_yticks(range(schedule.ranks), [f"rank {rank}" for rank in range(schedule.ranks)], fontsize=8)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
