"""The rows of `megapre bench comm` and the verdicts of `megapre tune comm` as tables, JSON and Markdown."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..mesh import Mesh
    from ..plan.link import Link
    from .bench_comm import Report, Row
    from .tune_comm import Comparison

COLUMNS = ("size", "p20 us", "p50 us", "p80 us", "alg GB/s", "bus GB/s", "fit us", "")


def width() -> int | None:
    return None if sys.stdout.isatty() else 110


def header(about: dict[str, Any], mesh: Mesh) -> RenderableType:
    from rich.text import Text

    software = f", {about['backend']}, torch {about['torch']}, megapre {about['megapre']}\n"
    nodes = f"{about['nodes']} node{'s' * (about['nodes'] > 1)} of {about['ranks_per_node']} ranks"
    return Text.assemble((f"{about['hardware']}", "bold"), software, nodes, f"; the slowest rank counts\n{mesh}\n")


def table(rows: list[Row], link: Link | str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    first = rows[0]
    title = Text.assemble((first.collective, "bold blue"), f"  {first.axis} of {first.ranks} ranks")
    return Group(title, _plain(COLUMNS, [cells(row, link) for row in rows]), Text(f"{describe(link)}\n"))


def describe(link: Link | str) -> str:
    if isinstance(link, str):
        return f"no fit: {link}"
    return (
        f"latency {micro(link.latency)} us, bus bandwidth {gb(link.bandwidth)} GB/s; the fit is off by "
        f"{link.error:.1%} at the median, {link.worst:.0%} at most"
    )


def cells(row: Row, link: Link | str) -> list[str]:
    fitted = "" if isinstance(link, str) else micro(link.seconds(row.collective, row.size, row.ranks))
    times = [micro(seconds) for seconds in (row.p20, row.p50, row.p80)]
    rates = [gb(rate) for rate in (row.algorithm_bandwidth, row.bus_bandwidth)]
    return [_bytes(row.size), *times, *rates, fitted, row.wrong or "correct"]


def micro(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:.2f}" if us < 100 else f"{us:,.0f}"


def gb(rate: float) -> str:
    """Bytes/s in GB/s: three digits, no exponent."""
    places = 2 - floor(log10(rate / 1e9)) if rate > 0 else 0
    return f"{rate / 1e9:,.{min(max(places, 0), 9)}f}"


def _bytes(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:g} {unit}" if size % scale == 0 else f"{size:,} B"
    return f"{size} B"


def write(report: Report, out: str) -> list[str]:
    """Writes comm_<hardware>_<ranks>_<date>.json and .md into the folder `out`, which is made; a line for each."""
    links = [
        {"axis": axis, "collective": collective, **({"none": link} if isinstance(link, str) else asdict(link))}
        for (axis, collective), link in report.links.items()
    ]
    rows = [
        {**asdict(row), "algorithm_bandwidth": row.algorithm_bandwidth, "bus_bandwidth": row.bus_bandwidth}
        for row in report.rows
    ]
    lines = ["# Collectives", "", *(f"- {name}: {value}" for name, value in report.about.items()), ""]
    lines += [
        f"| axis | ranks | collective | {' | '.join(COLUMNS[:-1])} | check |",
        "|---|--:|---|" + "--:|" * 7 + "---|",
    ]
    for row in report.rows:
        of = cells(row, report.links[row.axis, row.collective])
        lines.append(f"| {row.axis} | {row.ranks} | {row.collective} | {' | '.join(of)} |")
    lines += ["", *(f"- {axis} {name}: {describe(link)}" for (axis, name), link in report.links.items())]
    return _files("comm", report.about, out, {"about": report.about, "links": links, "rows": rows}, lines)


def comparison(of: Comparison) -> RenderableType:
    """A table of one comparison of `megapre tune comm`."""
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble((of.what, "bold blue"), f"  default {of.default}, {micro(of.seconds)} us")
    names = ("candidate", "time / default's", "rounds won", "")
    return Group(title, _plain(names, [verdict_cells(of, name) for name in of.verdicts]), Text(f"{of.said()}\n"))


def verdict_cells(of: Comparison, name: str) -> list[str]:
    verdict = of.verdicts[name]
    if not verdict.rounds:
        return [name, "", "", verdict.state]
    return [name, f"{verdict.ratio:.3f}", f"{verdict.wins} of {verdict.rounds}", verdict.state]


def write_comparisons(comparisons: list[Comparison], about: dict[str, Any], out: str) -> list[str]:
    """Writes comm-tuned_<hardware>_<ranks>_<date>.json and .md into the folder `out`, which is made."""
    lines = ["# Communication settings", "", *(f"- {name}: {value}" for name, value in about.items())]
    for of in comparisons:
        lines += ["", f"## {of.what}", "", f"Default {of.default}, {micro(of.seconds)} us. {of.said()}.", ""]
        lines += ["| candidate | time / default's | rounds won | |", "|---|--:|--:|---|"]
        lines += [f"| {' | '.join(verdict_cells(of, name))} |" for name in of.verdicts]
    content = {"about": about, "comparisons": [asdict(of) for of in comparisons]}
    return _files("comm-tuned", about, out, content, lines)


def _plain(names: tuple[str, ...], rows: list[list[str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, name in enumerate(names):
        last = number == len(names) - 1
        table.add_column(name, justify="left" if last or number == 0 else "right", no_wrap=not last)
    for row in rows:
        table.add_row(*row)
    return table


def _files(word: str, about: dict[str, Any], out: str, content: dict[str, Any], lines: list[str]) -> list[str]:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    hardware = re.sub(r"[^a-z0-9]+", "-", str(about["hardware"]).lower()).strip("-")
    stem = folder / f"{word}_{hardware}_{about['nodes']}x{about['ranks_per_node']}_{about['date']}"
    Path(f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"written: {stem}.json", f"written: {stem}.md"]
