"""The rows of train_step.py as a picture: bars of tokens/s by provider, a group for each model, memory beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megapre.observe.bench_picture import FAINT, INK, LINE, OURS, PEER

Row = dict[str, Any]


def draw(rows: list[Row], where: str, path: Path) -> None:
    """Bars in the order of `rows`, long as their model's fastest allows. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {case: [row for row in rows if row["case"] == case] for case in dict.fromkeys(row["case"] for row in rows)}
    figure = Figure(figsize=(8, 1.4 + 0.22 * len(rows) + 0.4 * len(groups)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    at, ticks, labels = 0.0, [], []
    for case, found in groups.items():
        axes.text(0, at + 0.1, case, fontsize=8, color=INK, fontweight="bold", va="center")
        most = max(row["tokens_per_s"] for row in found)
        for row in found:
            at += 1
            long = 100 * row["tokens_per_s"] / most
            axes.barh(at, long, height=0.78, color=OURS if row["provider"].startswith("megapre") else PEER)
            text = f"{row['tokens_per_s']:,.0f} tok/s  {row['memory_bytes'] / 2**30:.1f} GiB"
            axes.text(long + 0.6, at, text, fontsize=6.5, color=INK, va="center")
            ticks.append(at)
            labels.append(row["provider"])
        at += 1.7
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(max(at - 0.9, 0), -0.9)
    axes.set_xlim(0, 128)
    axes.set_xlabel("% of the tokens/s of the model's fastest", color=INK, fontsize=8)
    axes.set_title(f"Training step on {where}: megapre blue, peers grey", loc="left", fontsize=10, color=INK, pad=10)
    axes.tick_params(colors=INK, length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    figure.savefig(path)
