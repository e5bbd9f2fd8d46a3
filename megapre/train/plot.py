"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder import read_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

INK, FAINT, TRAIN, VALID = "#24292f", "#8c959f", "#0969da", "#cf222e"
FASTEST_FALL = 0.02  # share of the run over which the smoothed curve forgets


def loss_curve(run: Path, vocab: int, title: str) -> Path:
    """Draws loss.png of a run folder: training loss, raw and smoothed, validation loss, and ln V, where guessing
    stands.

    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    records = read_metrics(run)
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    valid = [(r["step"], r["valid_loss"]) for r in records if r.get("valid_loss") is not None]
    guess = math.log(vocab)

    figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(guess, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"ln V = {guess:.2f}",
        (1, guess),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=FAINT,
        fontsize=9,
    )
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smoothed(losses), color=TRAIN, linewidth=1.8, label=f"train {smoothed(losses)[-1]:.3f}")
    if valid:
        steps, losses = zip(*valid, strict=True)
        axes.plot(steps, losses, color=VALID, linewidth=1.4, marker="o", markersize=4, label=f"valid {losses[-1]:.3f}")
    _dress(axes, title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    path = run / "loss.png"
    figure.savefig(path)
    return path


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average without a bias at the start (Kingma and Ba 2014, section 3)."""
    keep = 1 - 1 / max(FASTEST_FALL * len(values), 1)
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(average / weight)
    return out


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d0d7de")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93), fontsize=10, labelcolor=INK)
