"""The rows of `megapre bench kernels` as a picture: bars of per cent of the ceiling."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from .bench_report import ceilings, number

if TYPE_CHECKING:
    from .bench_kernels import Report

INK, FAINT, LINE, OURS, PEER = "#24292f", "#8c959f", "#d0d7de", "#0969da", "#c9d1d9"


def draw(report: Report, path: Path) -> None:
    """Bars of per cent of the ceiling, a group for each case and mode. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in report.rows if row.repeats]
    groups = [list(rows) for _, rows in groupby(timed, key=lambda row: (row.op, row.shape, row.dtype, row.mode))]
    height = 1.6 + 0.2 * len(timed) + 0.34 * len(groups)
    figure = Figure(figsize=(10, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    at, most = 0.0, max(1.0, *(row.of_ceiling for row in timed))
    ticks: list[float] = []
    labels: list[str] = []
    for rows in groups:
        first = rows[0]
        title = f"{first.op}  {first.mode}  {first.shape}  {first.dtype}  ({first.bound})"
        axes.text(0, at + 0.1, title, fontsize=7.5, color=INK, fontweight="bold", va="center")
        for row in rows:
            at += 1
            axes.barh(at, 100 * row.of_ceiling, height=0.78, color=PEER if row.peer else OURS)
            text = f"{100 * row.of_ceiling:.0f}%  {number(row.best_ms)} ms"
            axes.text(100 * row.of_ceiling + 0.6, at, text, fontsize=6.5, color=INK, va="center")
            ticks.append(at)
            labels.append(row.provider + (" *" if row.in_use else ""))
        at += 1.7
    axes.axvline(100, color=INK, linewidth=1)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(at - 0.9, -0.9)
    axes.set_xlim(0, 100 * most * 1.14)
    axes.set_xlabel(f"% of the ceiling measured in the same run: {ceilings(report)}", color=INK, fontsize=8)
    threads = f", {report.about['threads']} threads" if "threads" in report.about else ""
    title = f"Kernels on {report.about['hardware']}{threads}: megapre blue, peers grey, * in use"
    axes.set_title(title, loc="left", fontsize=10, color=INK, pad=10)
    axes.tick_params(colors=INK, length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    figure.savefig(path)
