"""The rows of `megapre bench kernels` as a table, as CSV, JSON and Markdown, and as a picture."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..kernels.bench.run import Row
    from .bench_kernels import Report

INK, FAINT, LINE, OURS, PEER = "#24292f", "#8c959f", "#d0d7de", "#0969da", "#c9d1d9"


def header(about: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    keys = ("threads", "level", "torch", "megapre")
    software = [f"{key} {about[key]}" for key in keys if key in about]
    return Text.assemble(
        (f"{about['hardware']}", "bold"),
        f", {', '.join(software)}\n",
        f"caches {about['caches']}; the {about['counts']} of at most {about['repeats']} calls counts",
        f"; {about['memory']}\n" if "memory" in about else "\n",
        f"profile {about['profile']}\n",
    )


def tables(report: Report) -> Iterator[RenderableType]:
    """One table for each case, then the ceilings and what was left out."""
    from rich.table import Table
    from rich.text import Text

    goals = any(row.goal for row in report.rows)
    for (op, shape, dtype), rows in groupby(report.rows, key=lambda row: (row.op, row.shape, row.dtype)):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("mode", width=9)
        table.add_column("provider", width=16)
        names = ("min ms", "median", "p20-p80", "rate", "of ceiling", "vs best peer", *(["goal"] if goals else []))
        for name, width in zip(names, (9, 9, 17, 14, 10, 20, 20), strict=False):
            table.add_column(name, justify="left" if name == "goal" else "right", width=width, no_wrap=True)
        last, untimed = "", {}
        for row in rows:
            if row.repeats:
                table.add_row(*cells(row, last, goals), style="bold" if row.in_use else "")
                last = row.mode
            else:
                untimed[row.provider] = row.note
        yield Text.assemble((op, "bold blue"), f"  {shape}  {dtype}")
        yield table
        yield from (Text(f"{provider} was not timed: {note}") for provider, note in untimed.items())
        yield ""
    rates = [
        f"copy {rate:.1f} GB/s" if name == "copy" else f"{name} {rate * 1e3:.0f} GFLOP/s"
        for name, rate in sorted(report.ceilings.items())
    ]
    yield Text(f"ceilings of this run: {', '.join(rates) or 'none measured'}; * and bold: in use")
    missing = report.about["cases"] - report.about["cases_measured"]  # type: ignore[operator]
    if missing:
        yield Text(f"{missing} of {report.about['cases']} cases were not finished; raise --budget, or name fewer ops")


def cells(row: Row, last_mode: str = "", goals: bool = False) -> list[str]:
    """A row as text. The mode is left out where the line above has it too."""
    mode = "" if row.mode == last_mode else row.mode
    name = f"{row.provider} *" if row.in_use else row.provider
    if not row.repeats:
        return [mode, name, "", "", "", "", "", row.note, *([""] if goals else [])]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x {row.best_peer}"
    found = [
        mode,
        name,
        number(row.min_ms),
        number(row.p50_ms),
        f"{number(row.p20_ms)}-{number(row.p80_ms)}",
        f"{row.gb_s:.1f} GB/s" if row.bound == "copy" else f"{row.tflop_s * 1e3:.0f} GFLOP/s",
        f"{100 * row.of_ceiling:.0f}%",
        ratio,
    ]
    met = "" if row.met is None else f"{row.goal} {'met' if row.met else 'missed'}"
    return [*found, met] if goals else found


def number(ms: float) -> str:
    """Milliseconds with three or four digits."""
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def write(report: Report, out: str) -> list[str]:
    """Writes the files into the folder `out`, which is made; a line for each."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    word = re.sub(r"[^a-z0-9]+", "-", str(report.about["hardware"]).lower()).strip("-")
    if report.about["device"] == "cpu":
        word += f"-{report.about['threads']}threads-{re.sub('[^a-z0-9]+', '-', str(report.about['level']))}"
    stem = folder / f"kernels_{report.about['device']}_{word}_{report.about['date']}"
    files = {".csv": as_csv(report.rows), ".json": as_json(report), ".md": as_markdown(report)}
    for suffix, text in files.items():
        Path(f"{stem}{suffix}").write_text(text, encoding="utf-8")
    lines = [f"written: {stem}{suffix}" for suffix in files]
    if not any(row.repeats for row in report.rows):
        return lines
    try:
        draw(report, Path(f"{stem}.png"))
    except ImportError:
        return [*lines, "no picture: matplotlib is not installed (pip install 'megapre[observe]')"]
    return [*lines, f"written: {stem}.png"]


def as_csv(rows: list[Row]) -> str:
    from ..kernels.bench.run import Row

    text = io.StringIO()
    names = [field.name for field in fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def as_json(report: Report) -> str:
    content = {"about": report.about, "ceilings": report.ceilings, "rows": [asdict(row) for row in report.rows]}
    return json.dumps(content, indent=1) + "\n"


def as_markdown(report: Report) -> str:
    goals = any(row.goal for row in report.rows)
    names = ["mode", "provider", "min ms", "median ms", "p20-p80 ms", "rate", "of ceiling", "vs best peer"]
    names = ["op", "shape", "dtype", *names, *(["goal"] if goals else [])]
    lines = [f"# Kernels on {report.about['hardware']}", ""]
    lines += [f"- {key}: {value}" for key, value in report.about.items()]
    lines += [f"- ceiling {name}: {rate:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}" for name, rate in
              sorted(report.ceilings.items())]  # fmt: skip
    lines += ["", f"| {' | '.join(names)} |", f"|{'---|' * 5}{'---:|' * 6}{'---|' * goals}"]
    for row in report.rows:
        values = cells(row, goals=goals)
        lines.append(f"| {row.op} | {row.shape} | {row.dtype} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


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
    rates = ", ".join(
        f"copy {rate:.1f} GB/s" if name == "copy" else f"{name} {rate * 1e3:,.0f} GFLOP/s"
        for name, rate in sorted(report.ceilings.items())
    )
    axes.set_xlabel(f"% of the ceiling measured in the same run: {rates}", color=INK, fontsize=8)
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
