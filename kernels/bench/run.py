"""Cases into rows: every provider of a case in turn, against its peers and against the ceiling of the same run."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch
from torch import Tensor

from .. import registry
from .case import DTYPES, Case, Provider, distance, implementations
from .timer import Ceilings, Timer, Work, quantile


@dataclass
class Row:
    """One provider of one op at one size in one mode. Times in ms; rates by the time that counts on the device.

    `of_ceiling` is a fraction, `ratio` the time of the fastest peer over this one. A provider that could not be timed
    has no repeats, and a note that says why. `wall_ms` is a call's wall-clock time on CUDA, with what Python costs: 0
    on a CPU, where all times are that, and where something is prepared before each call.
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
    flops: int = 0
    bytes: int = 0
    gb_s: float = 0.0
    tflop_s: float = 0.0
    bound: str = "copy"
    of_ceiling: float = 0.0
    best_peer: str = ""
    ratio: float | None = None
    goal: str = ""
    reached: float | None = None
    met: bool | None = None
    note: str = ""
    best_ms: float = field(default=0.0, repr=False)

    def time(self, times: list[float], by: str) -> None:
        """Fills times and rates in from the repeats; `by` is "minimum" or "median"."""
        self.repeats, self.min_ms = len(times), min(times)
        self.p20_ms, self.p50_ms, self.p80_ms = (quantile(times, at) for at in (0.2, 0.5, 0.8))
        self.best_ms = self.min_ms if by == "minimum" else self.p50_ms
        self.gb_s, self.tflop_s = self.bytes / self.best_ms / 1e6, self.flops / self.best_ms / 1e9


class Plan(NamedTuple):
    """A case still to be built (it takes memory), in the modes wanted of it."""

    build: Callable[[], Case]
    modes: Collection[str]
    goals: Mapping[str, tuple[str, float]] | None = None


class Runner:
    """Measures cases on one device. `rows` grows with each; `finish` holds them against the ceilings of the run.

    `wanted` are provider names, none for all but `reference` (unless an op has nothing else) and `compile`.
    """

    def __init__(self, device: str, wanted: Collection[str] = (), repeats: int = 25, cold: bool = True) -> None:
        self.device, self.wanted, self.repeats = device, set(wanted), repeats
        self.timer, self.ceilings = Timer(device, cold), Ceilings(device)
        self.rows: list[Row] = []

    def run(self, plans: Iterable[Plan], budget: float = float("inf")) -> Iterator[list[Row]]:
        """Yields the rows of each case when they are there. What has not begun after `budget` seconds is left out.

        Every case gets an even share of what is left, and each provider at least three calls.
        """
        end, plans = time.monotonic() + budget, list(plans)
        for at, plan in enumerate(plans):
            left = end - time.monotonic()
            if left <= 0:
                return
            before = len(self.rows)
            self.case(plan.build(), plan.modes, left / (len(plans) - at), plan.goals)
            yield self.rows[before:]

    def case(
        self,
        case: Case,
        modes: Collection[str] = (),
        budget: float = float("inf"),
        goals: Mapping[str, tuple[str, float]] | None = None,
    ) -> list[Row]:
        """The rows of one case in those of `modes` that it has (none: all), in about `budget` seconds."""
        begun, before = time.monotonic(), len(self.rows)
        modes = [mode for mode in case.work if not modes or mode in modes or mode == "step"]
        providers = self._providers(case)
        results: list[Tensor] | None = None
        ready: dict[str, dict[str, Work]] = {}
        notes: dict[str, str] = {}
        for name in sorted(providers, key=lambda name: name != "torch"):  # the others are compared with it
            try:
                works, found = prepared(case, providers[name].function, modes)
            except Exception as failure:  # a peer can fail in any way, and the others shall be measured
                notes[name] = brief(failure)
                continue
            worst = max((distance(a, b) for a, b in zip(found, results or found, strict=True)), default=0.0)
            if worst <= case.tolerance:
                ready[name], results = works, found if results is None else results
            else:
                notes[name] = f"wrong: {worst:.1e} off, above {case.tolerance:.0e}; not timed"
        in_use = self._in_use(case)
        for at, mode in enumerate(modes):
            share = (begun + budget - time.monotonic()) / (len(modes) - at)
            rows = {
                name: Row(case.op, case.shape, case.dtype, mode, name, providers[name].peer, name == in_use)
                for name in providers
            }
            self._measure(case, mode, rows, {name: works[mode] for name, works in ready.items()}, share)
            for name, row in rows.items():
                row.note = notes.get(name, "")
            _compare(list(rows.values()), (goals or {}).get(mode))
            self.rows += rows.values()
        return self.rows[before:]

    def finish(self) -> list[Row]:
        """Holds every row against its ceiling, now that the best of the run is known."""
        for row in self.rows:
            if row.repeats:
                rate = row.gb_s if row.bound == "copy" else row.tflop_s
                row.of_ceiling = rate / self.ceilings.rate(row.bound, row.dtype)
        return self.rows

    def _providers(self, case: Case) -> dict[str, Provider]:
        usable = {name: provider for name, provider in case.providers().items() if not provider.why_not}
        if self.wanted:
            return {name: provider for name, provider in usable.items() if name in self.wanted}
        rows = [row.name for row in implementations(case.op) if row.name in usable]
        left_out = {"compile"} | ({"reference"} if rows != ["reference"] else set())
        return {name: provider for name, provider in usable.items() if name not in left_out}

    def _in_use(self, case: Case) -> str:
        if case.op in registry.OPS:
            return registry.choose(self.device, None, DTYPES[case.dtype]).names[case.op]
        return next((name for name, provider in case.providers().items() if not provider.why_not), "")

    def _measure(self, case: Case, mode: str, rows: dict[str, Row], works: dict[str, Work], share: float) -> None:
        """Times the works in turn with the probe of their ceiling between them, and fills their rows in."""
        if not works:
            return
        deadline = time.monotonic() + share
        probe = self.ceilings.probe(case.bound, DTYPES[case.dtype])
        turns: dict[str, tuple[Work, Callable[[], None] | None]] = {
            name: (work, case.prepare) for name, work in works.items()
        }
        turns[""] = (probe, None)
        self.timer.turns(turns, 1)  # warm up
        times = self.timer.turns(turns, self.repeats, deadline)
        self.ceilings.note(case.bound, case.dtype, min(times.pop("")))
        for name, taken in times.items():
            rows[name].bound = case.bound
            rows[name].flops, rows[name].bytes = case.work[mode]
            rows[name].time(taken, self.timer.by)
            if self.timer.device != "cpu" and case.prepare is None:  # it would be in the time
                rows[name].wall_ms = self.timer.wall(works[name])


def prepared(case: Case, function: Callable[..., Any], modes: Collection[str]) -> tuple[dict[str, Work], list[Tensor]]:
    """One call a mode of a provider, and what it computes: outputs, and gradients where a mode takes them."""
    if not case.leaves:
        if case.prepare is not None:
            case.prepare()
        return {"step": function}, [t.detach().clone() for t in function()]
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def full() -> None:
        outputs, upstream = _floating(function(*leaves)), case.upstream
        torch.autograd.grad(outputs, leaves, upstream)

    works: dict[str, Work] = {"forward": forward, "full": full}
    if modes == ["forward"]:
        with torch.no_grad():
            return works, _floating(function(*leaves))
    outputs = _floating(function(*leaves))
    keep = "backward" in modes
    upstream = [given.to(out.dtype) for given, out in zip(case.upstream, outputs, strict=True)]
    # A compiled backward reuses what was kept for it, unless told that the graph will be needed again.
    with functorch.patch(donated_buffer=False):
        grads = torch.autograd.grad(outputs, leaves, upstream, retain_graph=keep)
    if keep:
        works["backward"] = lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    return works, [*(out.detach() for out in outputs), *grads]


def _floating(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _compare(rows: list[Row], goal: tuple[str, float] | None) -> None:
    """Fills in the ratio to the fastest peer, and for the implementation in use whether the goal is met."""
    timed = {row.provider: row for row in rows if row.repeats}
    peers = [row for row in timed.values() if row.peer]
    best = min(peers, key=lambda row: row.best_ms, default=None)
    for row in timed.values():
        if best is not None:
            row.best_peer, row.ratio = best.provider, best.best_ms / row.best_ms
        if goal is not None and row.in_use and goal[0] in timed:
            row.goal, row.reached = f"{goal[1]:g}x {goal[0]}", timed[goal[0]].best_ms / row.best_ms
            row.met = row.reached >= goal[1]


def brief(failure: BaseException) -> str:
    text = (str(failure).strip().splitlines() or [""])[0]
    return f"{type(failure).__name__}: {text[:140]}"
