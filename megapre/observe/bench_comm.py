"""`megapre bench comm`: what each collective takes on each axis of the mesh, and the latency and bandwidth behind it.

All groups of an axis work at once, as in training, and the slowest rank of all counts. The model of a link and its fit
are those of `plan.link`, from which the planner reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import TYPE_CHECKING, Literal

from ..config import Comm, Config, Layout, Run
from ..plan import comm_profile
from ..plan.link import FACTORS, FitError, Link, fit
from .comm_ranks import BenchCommError, Ranks, on_ranks

if TYPE_CHECKING:
    from ..parallel.collectives import Call

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
AXES = ("tp", "cp", "dp", "pp", "world")
BUDGET = 10.0  # seconds for one collective on one axis


@dataclass(frozen=True)
class Request:
    """What to measure. Empty `axes` and `collectives` stand for all that there are; sizes are in bytes."""

    axes: tuple[str, ...] = ()
    collectives: tuple[str, ...] = ()
    smallest: int = 2**10
    largest: int = 2**24
    factor: int = 2
    repeats: int = 25
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Row:
    """One size of one collective: seconds of a call on the slowest rank; "wrong" says what the check found, if it did.

    Bandwidths are in bytes/s at the median: size / time, and that times the collective's factor (plan.link.FACTORS).
    """

    axis: str
    ranks: int
    collective: str
    size: int
    p20: float
    p50: float
    p80: float
    repeats: int
    wrong: str = ""

    @property
    def algorithm_bandwidth(self) -> float:
        return self.size / self.p50

    @property
    def bus_bandwidth(self) -> float:
        return self.algorithm_bandwidth * FACTORS[self.collective](self.ranks)


@dataclass(frozen=True)
class Report:
    """The rows, and by axis and collective the link behind them or why there is none."""

    about: dict[str, str | int]
    rows: list[Row]
    links: dict[tuple[str, str], Link | str]

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.wrong]

    def by_axis(self) -> dict[str, dict[str, Link]]:
        """The links that there are, as a profile keeps them."""
        found: dict[str, dict[str, Link]] = {}
        for (axis, collective), link in self.links.items():
            if isinstance(link, Link):
                found.setdefault(axis, {})[collective] = link
        return found


def run(
    request: Request,
    layout: Layout,
    out: str | None = None,
    write_profile: bool = False,
    profile: str = "",
    options: Comm | None = None,
) -> int:
    """Measures on all ranks; the first prints the table and writes files and profile. 0; 1 where a result was wrong.
    `options`: of the communicators.

    Raises BenchCommError, MeshError and CommError, before anything is measured where possible.
    """
    checked(request)
    settings = Run(steps=1, device=request.device)
    work = partial(_run, request, out=out, write_profile=write_profile, profile=profile)
    return on_ranks("bench", layout, settings, options or Comm(), work)


def _run(request: Request, ranks: Ranks, out: str | None, write_profile: bool, profile: str) -> int:
    from rich.console import Console

    from . import comm_report

    console = Console(width=comm_report.width())
    if ranks.first:
        console.print(comm_report.header(ranks.about(), ranks.groups.mesh))
    rows: list[Row] = []
    links: dict[tuple[str, str], Link | str] = {}
    for axis, collective in cases(request, ranks):
        found = measure(request, ranks, axis, collective)
        rows += found
        links[axis, collective] = linked(found)
        if ranks.first:
            console.print(comm_report.table(found, links[axis, collective]))
    report = Report(ranks.about(), rows, links)
    if not ranks.first:
        return 1 if report.wrong else 0
    if out is not None:
        for line in comm_report.write(report, out):
            print(line)
    if report.wrong:
        print(f"{len(report.wrong)} of {len(rows)} results were wrong" + "; no profile is written" * write_profile)
        return 1
    if write_profile:
        file = comm_profile.path(profile)
        comm_profile.write(file, ranks.key(), report.by_axis())
        print(f"profile written to {file}")
    return 0


def checked(request: Request) -> None:
    """Raises BenchCommError where there is no such axis or collective, or no ladder of sizes."""
    for kind, asked, known in (("axis", request.axes, AXES), ("collective", request.collectives, tuple(FACTORS))):
        if unknown := [name for name in asked if name not in known]:
            raise BenchCommError(f"bench comm: there is no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    if not 4 <= request.smallest <= request.largest:
        raise BenchCommError(
            f"bench comm: sizes from {request.smallest:,} to {request.largest:,} bytes are none; from 4 bytes up"
        )


def cases(request: Request, ranks: Ranks) -> list[tuple[str, str]]:
    """(axis, collective) of all that was asked for. Raises BenchCommError where all axes have one rank.

    Unless asked otherwise a pipeline has what training sends through it, and axes of one rank are left out.
    """
    from ..parallel.collectives import group_of

    sizes = {axis: group_of(ranks.groups, axis).size for axis in request.axes or AXES}
    several = [axis for axis, size in sizes.items() if size > 1]
    if lone := [axis for axis in request.axes if axis not in several]:
        raise BenchCommError(f"bench comm: --axis {', '.join(lone)} has one rank in\n{ranks.groups.mesh}")
    if not request.axes and any(sizes[axis] == ranks.here.world for axis in several if axis != "world"):
        several.remove("world")  # these are all ranks already
    of_pipeline = tuple(request.collectives) or ("send_recv", "broadcast")
    of_group = tuple(request.collectives) or tuple(FACTORS)
    return [(axis, name) for axis in several for name in (of_pipeline if axis == "pp" else of_group)]


def measure(request: Request, ranks: Ranks, axis: str, collective: str) -> list[Row]:
    """A row for each size, checked before and after it is timed."""
    from ..parallel.collectives import Call, group_of, rounded
    from ..parallel.stopwatch import sample

    among = group_of(ranks.groups, axis).size
    sizes = list(dict.fromkeys(rounded(size, among) for size in ladder(request)))
    calls = [Call(collective, ranks.groups, axis, size) for size in sizes]
    before = [call.check() for call in calls]
    times = sample([partial(_message, ranks, call) for call in calls], request.repeats, BUDGET)
    rows = []
    for call, first, found in zip(calls, before, times, strict=True):
        wrong = call.check() or first  # on every rank, whatever came out first
        if ranks.stopwatch.most(float(bool(wrong))) and not wrong:
            wrong = "numbers are wrong on another rank"
        rows.append(row(axis, among, collective, call.size, found, wrong))
    return rows


def _message(ranks: Ranks, call: Call, calls: int) -> float:
    return ranks.stopwatch(call, calls) / call.messages


def ladder(request: Request) -> Iterator[int]:
    """smallest, smallest * factor, ... up to largest, in bytes."""
    size = request.smallest
    while size <= request.largest:
        yield size
        size *= request.factor


def row(axis: str, ranks: int, collective: str, size: int, times: list[float], wrong: str = "") -> Row:
    p20, _, _, p80 = quantiles(times, n=5, method="inclusive")
    p50 = quantiles(times, n=2, method="inclusive")[0]
    return Row(axis, ranks, collective, size, p20, p50, p80, len(times), wrong)


def linked(rows: list[Row]) -> Link | str:
    """The link behind the medians of one collective, or why none can be told."""
    try:
        return fit(rows[0].collective, rows[0].ranks, {row.size: row.p50 for row in rows if not row.wrong})
    except FitError as error:
        return str(error)


def parse_size(text: str) -> int:
    """Bytes in a text such as "64KiB", "1MiB" or "4096". Raises BenchCommError."""
    number = text.strip().rstrip("KMGiB")
    unit = text.strip()[len(number) :]
    if not number.isdecimal() or unit not in UNITS:
        raise BenchCommError(f"bench comm: {text!r} is no size; write it as in 4096, 64KiB, 16MiB or 1GiB")
    return int(number) * UNITS[unit]


def layout_of(text: str, cfg: Config | None) -> Layout:
    """The layout of `cfg`, or that in a text such as "tp=2,pp=2", dp being what is left. Raises BenchCommError."""
    if cfg is not None and text:
        raise BenchCommError("bench comm: a recipe and --layout both give a layout; leave one out")
    if cfg is not None:
        return cfg.layout
    sizes = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, number = word.partition("=")
        if name not in ("tp", "pp", "cp", "dp") or not number.isdecimal() or int(number) < 1:
            raise BenchCommError(f"bench comm: --layout {word!r}: tp, pp, cp and dp with a size, as in tp=2,pp=2")
        sizes[name] = int(number)
    return Layout.model_validate(sizes)
