"""Timelines as a picture."""

from pathlib import Path

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


def write_picture(timeline: Timeline, path: str | Path, unit: str = "") -> None:
    """Draws the timeline, a row a rank; `unit` is that of the time axis. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    schedule = timeline.schedule
    width, row = 12.0, 0.34
    figure = Figure(figsize=(width, 1.5 + row * schedule.ranks), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    inches = (width - 1) / timeline.makespan
    room = 0.075 * len(str(schedule.micro_batches - 1))
    boxes: list[list[tuple[float, float]]] = []
    colours: list[str] = []
    used: dict[tuple[str, int], None] = {}
    for rank, program in enumerate(schedule):
        for action, start, end in zip(program, timeline.starts[rank], timeline.ends[rank], strict=True):
            boxes.append([(start, rank - 0.45), (end, rank - 0.45), (end, rank + 0.45), (start, rank + 0.45)])
            shades = COLOURS[action.kind]
            colours.append(shades[action.chunk % len(shades)])
            used[action.kind, action.chunk] = None
            if (end - start) * inches > room:
                axes.text(
                    (start + end) / 2, rank, str(action.micro_batch), fontsize=7, color=INK, ha="center", va="center"
                )
    thin = 0.4 if len(boxes) < 2000 else 0.0
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="white", linewidths=thin))
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(schedule.ranks - 0.45, -0.55)
    axes.set_yticks(range(schedule.ranks), [f"rank {rank}" for rank in range(schedule.ranks)], fontsize=8)
    axes.set_xlabel(f"time{f' ({unit})' if unit else ''}; the numbers are micro-batches", fontsize=8, color=INK)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(summary(timeline), loc="left", fontsize=9, color=INK)
    chunk = (lambda c: f", chunk {c}") if schedule.chunks > 1 else (lambda c: "")
    patches = [
        Patch(color=COLOURS[kind][c % 4], label=f"{NAMES[kind]}{chunk(c)}")
        for kind, c in sorted(used, key=lambda pair: ("FBIW".index(pair[0]), pair[1]))[:8]
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
