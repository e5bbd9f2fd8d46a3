"""The rows of `megapre bench kernels` as tables, as CSV, JSON and Markdown, and as a picture (bench_picture.py)."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..kernels.bench.row import Held, Row
    from .bench_kernels import Report


class Column(NamedTuple):
    """A column of a table: its head, its width on a terminal, and the text of a row in it."""

    head: str
    width: int
    text: Callable[[Row], str]


def number(ms: float) -> str:
    """Milliseconds with three or four digits."""
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _rate(row: Row) -> str:
    if row.bound == "copy":
        return f"{row.gb_s:.1f} GB/s" if row.gb_s < 1000 else f"{row.gb_s:.0f} GB/s"
    return f"{row.tflop_s * 1e3:.0f} GFLOP/s" if row.tflop_s < 10 else f"{row.tflop_s:.0f} TFLOP/s"


LEAST = Column("min ms", 9, lambda row: number(row.min_ms))
SPREAD = Column("p20-p80", 17, lambda row: f"{number(row.p20_ms)}-{number(row.p80_ms)}")
RATES = (
    Column("rate", 14, _rate),
    Column("of ceiling", 10, lambda row: f"{100 * row.of_ceiling:.0f}%"),
    Column("vs best peer", 20, lambda row: "" if row.ratio is None else f"{row.ratio:.2f}x {row.best_peer}"),
)
COLUMNS = {
    "cpu": (LEAST, Column("median", 9, lambda row: number(row.p50_ms)), SPREAD, *RATES),
    "cuda": (
        Column("median ms", 9, lambda row: number(row.p50_ms)),
        SPREAD,
        Column("graph", 9, lambda row: number(row.graph_ms) if row.graph_ms else "none"),
        Column("wall", 9, lambda row: number(row.wall_ms)),
        *RATES,
        Column("error", 7, lambda row: f"{row.error:.0e}"),
        Column("peak MiB", 8, lambda row: f"{row.peak_mib:.0f}"),
    ),
}
WIDTH = 240
"""Columns where the output is no terminal: every goal has a line, and none of its cells is cut."""


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
    """One table for each case, then the goals, the ceilings and what was left out."""
    from rich.table import Table
    from rich.text import Text

    columns = COLUMNS[report.device]
    for (op, shape, dtype), rows in groupby(report.rows, key=lambda row: (row.op, row.shape, row.dtype)):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("mode", width=9)
        table.add_column("provider", min_width=16)
        for column in columns:
            table.add_column(column.head, justify="right", width=column.width, no_wrap=True)
        last, untold = "", {}
        for row in rows:
            if row.repeats:
                table.add_row(*cells(row, columns, last), style="bold" if row.in_use else "")
                last = row.mode
                if row.graph_note:
                    untold[row.provider] = f"has no graph: {row.graph_note}"
            else:
                untold[row.provider] = f"was not timed: {row.note}"
        yield Text.assemble((op, "bold blue"), f"  {shape}  {dtype}")
        yield table
        yield from (Text(f"{provider} {told}") for provider, told in untold.items())
        yield ""
    yield from goals(report.held)
    yield Text(f"ceilings of this run: {ceilings(report) or 'none measured'}; * and bold: in use")
    missing = report.about["cases"] - report.about["cases_measured"]  # type: ignore[operator]
    if missing:
        yield Text(f"{missing} of {report.about['cases']} cases were not finished; raise --budget, or name fewer ops")


def goals(held: list[Held]) -> Iterator[RenderableType]:
    """What the op in use, and others of ours, were held to."""
    from rich.table import Table
    from rich.text import Text

    if not held:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("op", "shape", "mode", "provider", "goal", "reached", ""):
        table.add_column(head, overflow="fold")  # on a narrow terminal a cell has several lines, but all of its text
    for of in held:
        table.add_row(*_of_goal(of), style="" if of.met is not False else "red")
    yield Text.assemble(("goals", "bold blue"), f"  {sum(of.met is True for of in held)} of {len(held)} met")
    yield table
    yield ""


def _of_goal(held: Held) -> list[str]:
    name = f"{held.provider} *" if held.in_use else held.provider
    return [held.op, held.shape, held.mode, name, held.goal, held.reached, held.verdict]


def ceilings(report: Report) -> str:
    return ", ".join(
        f"copy {rate:.1f} GB/s" if name == "copy" else f"{name} {rate * 1e3:.0f} GFLOP/s"
        for name, rate in sorted(report.ceilings.items())
    )


def cells(row: Row, columns: Iterable[Column], last_mode: str = "") -> list[str]:
    """A row as text. The mode is left out where the line above has it too."""
    mode = "" if row.mode == last_mode else row.mode
    name = f"{row.provider} *" if row.in_use else row.provider
    return [mode, name, *(column.text(row) if row.repeats else "" for column in columns)]


def write(report: Report, out: str, picture: bool = True) -> list[str]:
    """Writes the files into the folder `out`, which is made, by one rename each; a line for each."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    word = re.sub(r"[^a-z0-9]+", "-", str(report.about["hardware"]).lower()).strip("-")
    if report.device == "cpu":
        word += f"-{report.about['threads']}threads-{re.sub('[^a-z0-9]+', '-', str(report.about['level']))}"
    stem = folder / f"kernels_{report.device}_{word}_{report.about['date']}"
    files = {".csv": as_csv(report), ".json": as_json(report), ".md": as_markdown(report)}
    for suffix, text in files.items():
        temporary = stem.with_name(f".{stem.name}{suffix}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(f"{stem}{suffix}")
    lines = [f"written: {stem}{suffix}" for suffix in files]
    if not picture or not any(row.repeats for row in report.rows):
        return lines
    try:
        from .bench_picture import draw

        draw(report, Path(f"{stem}.png"))
    except ImportError:
        return [*lines, "no picture: matplotlib is not installed (pip install 'megapre[observe]')"]
    return [*lines, f"written: {stem}.png"]


def as_csv(report: Report) -> str:
    """A line a row, each with the machine and the commit it speaks of."""
    from ..kernels.bench.row import Row

    text = io.StringIO()
    told = {key: report.about[key] for key in ("hardware", "commit", "date")}
    writer = csv.DictWriter(text, [*told, *(field.name for field in fields(Row))], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**told, **asdict(row)} for row in report.rows)
    return text.getvalue()


def as_json(report: Report) -> str:
    content = {
        "about": report.about,
        "ceilings": report.ceilings,
        "goals": [{**asdict(of), "verdict": of.verdict} for of in report.held],
        "rows": [_finite(asdict(row)) for row in report.rows],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """With None in place of an infinite error, which JSON does not know."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def as_markdown(report: Report) -> str:
    lines = [f"# Kernels on {report.about['hardware']}", ""]
    lines += [f"- {key}: {value}" for key, value in report.about.items()]
    lines += [f"- ceiling {name}: {rate:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}" for name, rate in
              sorted(report.ceilings.items())]  # fmt: skip
    if report.held:
        lines += ["", "| op | shape | mode | provider | goal | reached | |", f"|{'---|' * 7}"]
        lines += [f"| {' | '.join(_of_goal(of))} |" for of in report.held]
    columns = COLUMNS[report.device]
    names = ["op", "shape", "dtype", "mode", "provider", *(column.head for column in columns), "note"]
    lines += ["", f"| {' | '.join(names)} |", f"|{'---|' * 5}{'---:|' * len(columns)}---|"]
    for row in report.rows:
        values = [row.op, row.shape, row.dtype, *cells(row, columns), row.note or row.graph_note]
        lines.append(f"| {' | '.join(value.replace('|', '/') for value in values)} |")
    return "\n".join(lines) + "\n"
