"""A row of the table: one provider of one op at one size in one mode; and the goals that rows are held to."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .timer import Beside, quantile

EVERY = "every provider"
"""In place of a provider's name, where a case failed before there was any."""
OWN = ("triton", "cuda")
"""Implementations that are held to a goal beside the one in use."""


@dataclass
class Row:
    """Times in ms; rates by the time that counts on the device.

    `of_ceiling` is a fraction, `ratio` the time of the fastest peer over this one, `error` the distance from an exact
    result (exact.py). A provider that could not be timed has no repeats, and a note that says why. Of CUDA alone:
    `wall_ms`, a call by the wall clock with what Python costs; `graph_ms`, the call replayed from a CUDA graph, or
    `graph_note`, why there is none; `peak_mib`, what a call allocates at most at one time.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    provider: str
    peer: bool
    in_use: bool
    repeats: int = 0
    min_ms: float = 0.0
    p20_ms: float = 0.0
    p50_ms: float = 0.0
    p80_ms: float = 0.0
    wall_ms: float = 0.0
    graph_ms: float = 0.0
    graph_note: str = ""
    flops: int = 0
    bytes: int = 0
    gb_s: float = 0.0
    tflop_s: float = 0.0
    bound: str = "copy"
    of_ceiling: float = 0.0
    error: float = 0.0
    peak_mib: float = 0.0
    best_peer: str = ""
    ratio: float | None = None
    note: str = ""
    best_ms: float = field(default=0.0, repr=False)

    def time(self, times: list[float], by: str) -> None:
        """Fills times and rates in from the repeats; `by` is "minimum" or "median"."""
        self.repeats, self.min_ms = len(times), min(times)
        self.p20_ms, self.p50_ms, self.p80_ms = (quantile(times, at) for at in (0.2, 0.5, 0.8))
        self.best_ms = self.min_ms if by == "minimum" else self.p50_ms
        self.gb_s, self.tflop_s = self.bytes / self.best_ms / 1e6, self.flops / self.best_ms / 1e9

    def add(self, beside: Beside) -> None:
        self.wall_ms, self.graph_ms, self.graph_note, self.peak_mib = beside


def compare(rows: Iterable[Row]) -> None:
    """Fills the ratio to the fastest peer into the rows of one mode."""
    timed = [row for row in rows if row.repeats]
    best = min((row for row in timed if row.peer), key=lambda row: row.best_ms, default=None)
    for row in timed:
        if best is not None:
            row.best_peer, row.ratio = best.provider, best.best_ms / row.best_ms


class Goal(NamedTuple):
    """At least `least` of `of`: "GB/s"; "%" of the ceiling; or times as fast as a provider, or as the "best peer". Of
    "ms" at most. It is the implementation in use that is held to it, and OWN beside it, unless `held` names one."""

    least: float
    of: str
    held: str = ""

    def reached(self, row: Row, others: Mapping[str, Row]) -> float | None:
        """What the row reaches of it; None where it, or what it is compared with, was not timed."""
        if not row.repeats:
            return None
        if self.of in _MEASURES:
            return float(_MEASURES[self.of](row))
        name = row.best_peer if self.of == "best peer" else self.of
        other = others.get(name)
        return other.best_ms / row.best_ms if other is not None and other.repeats else None

    @property
    def text(self) -> str:
        """As it is printed: >= 90 %."""
        return f"{'<=' if self.of == 'ms' else '>='} {self.words(self.least)}"

    def words(self, number: float) -> str:
        """A number of what the goal counts, with its unit."""
        return f"{number:.3g} {self.of}" if self.of in _MEASURES else f"{number:.3g}x {self.of}"


_MEASURES: dict[str, Callable[[Row], float]] = {
    "GB/s": lambda row: row.gb_s,
    "%": lambda row: 100 * row.of_ceiling,
    "ms": lambda row: row.best_ms,
}
Goals = Mapping[str, Sequence[Goal]]
"""By mode."""


@dataclass
class Held:
    """A provider held to a goal. `met` is None where it could not be seen."""

    op: str
    shape: str
    mode: str
    provider: str
    in_use: bool
    goal: str
    reached: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "not met", None: "not measured"}[self.met]


def hold(rows: Sequence[Row], goals: Goals) -> Iterator[Held]:
    """The rows of one case held to its goals; their ceilings must be filled in."""
    for mode, wanted in goals.items():
        others = {row.provider: row for row in rows if row.mode == mode}
        for goal in wanted:
            if goal.held and others and goal.held not in others:  # no others: the mode was not asked for
                yield missed((rows[0].op, rows[0].shape), mode, goal)
            for row in others.values():
                if row.provider == goal.held or (not goal.held and (row.in_use or row.provider in OWN)):
                    yield _held(goal, row, others)


def missed(case: tuple[str, str], mode: str, goal: Goal) -> Held:
    """A goal of a case (op, shape) that nothing was held to."""
    return Held(*case, mode, goal.held or "any", False, goal.text, "", None)


def _held(goal: Goal, row: Row, others: Mapping[str, Row]) -> Held:
    reached = goal.reached(row, others)
    met = None if reached is None else reached <= goal.least if goal.of == "ms" else reached >= goal.least
    told = "" if reached is None else goal.words(reached)
    return Held(row.op, row.shape, row.mode, row.provider, row.in_use, goal.text, told, met)
