"""Cases into rows: every provider of a case against its peers, an exact result, and the ceiling of the same run."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch._functorch.config as functorch
from torch import Tensor

from .. import registry
from .case import COMPILED, DTYPES, Case, Provider, implementations
from .ceilings import Ceilings
from .exact import OF_A_PEER, TOLERANCE, error, exact
from .row import EVERY, Goals, Held, Row, compare, hold, missed
from .timer import Prepare, Work, quantile, timer_of
from .works import prepared

COMPILE_SHARE = 0.4  # of the budget, at most, for providers that torch.compile makes
PROBES = 7  # of a ceiling, before a case on CUDA


class Plan(NamedTuple):
    """A case still to be built (it takes memory), in the modes wanted of it. `title`: its op, shape and dtype."""

    build: Callable[[], Case]
    modes: Collection[str] = ()
    goals: Goals | None = None
    title: tuple[str, str, str] = ("", "", "")


class Runner:
    """Measures cases on one device. `rows` grows with each; `finish` holds them against the ceilings of the run.

    `wanted` are provider names. None: all but `reference` (unless an op has nothing else), `compile` on a CPU, and on
    CUDA those that pass calls on to others, unless they are in use.
    """

    def __init__(self, device: str, wanted: Collection[str] = (), repeats: int = 25, cold: bool = True) -> None:
        self.device, self.wanted, self.repeats = device, set(wanted), repeats
        self.timer = timer_of(device, cold)
        with self.timer.scope():
            self.ceilings = Ceilings(device)
        self.rows: list[Row] = []
        self._held: list[tuple[list[Row], Goals]] = []
        self._ahead: list[Plan] = []  # and what could not be built
        self._end = self._most_compiling = float("inf")
        self._compiling = 0.0

    def run(self, plans: Iterable[Plan], budget: float = float("inf")) -> Iterator[list[Row]]:
        """Yields the rows of each case when they are there. What has not begun after `budget` seconds is left out.

        Every case gets an even share of what is left, and each provider a few calls in any case.
        """
        plans, self._end = list(plans), time.monotonic() + budget
        self._most_compiling, self._ahead = COMPILE_SHARE * budget, list(plans)
        for at, plan in enumerate(plans):
            left = self._end - time.monotonic()
            if left <= 0:
                return
            before = len(self.rows)
            self._build_and_measure(plan, left / (len(plans) - at))
            yield self.rows[before:]

    def _build_and_measure(self, plan: Plan, budget: float) -> None:
        self.timer.clear()
        try:
            with self.timer.scope():
                case = plan.build()
            self.case(case, plan.modes, budget, plan.goals)
            self._ahead.remove(plan)
        except Exception as failure:  # too large for the device, or the device is lost
            self.rows.append(Row(*plan.title, "", EVERY, False, False, note=brief(failure)))

    def case(
        self, case: Case, modes: Collection[str] = (), budget: float = float("inf"), goals: Goals | None = None
    ) -> list[Row]:
        """The rows of one case in those of `modes` that it has (none: all), in about `budget` seconds."""
        end = time.monotonic() + budget
        modes = [mode for mode in case.work if not modes or mode in modes or mode == "step"]
        providers, in_use = self._providers(case), self._in_use(case)
        of_mode = {mode: [self._row(case, mode, name, providers[name], in_use) for name in providers] for mode in modes}
        names = list(providers)
        batches = [names] if self.timer.together else [[name] for name in names]
        # A compiled backward reuses what was kept for it, unless told beforehand that it will be needed again.
        with self.timer.scope(), functorch.patch(donated_buffer=False):
            known = exact(case)
            if not self.timer.together:
                self._probe(case)
            for at, batch in enumerate(batches):
                here = {m: {row.provider: row for row in rows if row.provider in batch} for m, rows in of_mode.items()}
                share = (end - time.monotonic()) / (len(batches) - at)
                self._batch(case, {name: providers[name] for name in batch}, here, known, share)
        found = [row for rows in of_mode.values() for row in rows]
        for rows in of_mode.values():
            compare(rows)
        self.rows += found
        self._held.append((found, goals or {}))
        return found

    def finish(self) -> list[Row]:
        """Holds every row against its ceiling, as far as the best of the run is known."""
        for row in self.rows:
            if row.repeats:
                rate = row.gb_s if row.bound == "copy" else row.tflop_s
                row.of_ceiling = rate / self.ceilings.rate(row.bound, row.dtype)
        return self.rows

    def held(self) -> list[Held]:
        """Rows held to the goals of their cases, once `finish` has been called, and goals of what was not measured."""
        found = [held for rows, goals in self._held for held in hold(rows, goals)]
        for plan in self._ahead:
            found += [missed(plan.title[:2], mode, goal) for mode, of in (plan.goals or {}).items() for goal in of]
        return found

    def _row(self, case: Case, mode: str, name: str, provider: Provider, in_use: str) -> Row:
        flops, moved = case.work[mode]
        row = Row(case.op, case.shape, case.dtype, mode, name, provider.peer, name == in_use)
        row.flops, row.bytes, row.bound = flops, moved, case.bound
        return row

    def _probe(self, case: Case) -> None:
        """Measures the ceiling of the case once more."""
        times = self.timer.turns({"": (self.ceilings.probe(case.bound, DTYPES[case.dtype]), None)}, PROBES)[""]
        self.ceilings.note(case.bound, case.dtype, quantile(times, 0.5))

    def _batch(
        self, case: Case, batch: dict[str, Provider], rows: dict[str, dict[str, Row]], known: list[Tensor], share: float
    ) -> None:
        """Prepares and checks the providers of a batch and measures those that are right, taking turns."""
        begun = time.monotonic()
        ready: dict[str, dict[str, Work]] = {}
        with ExitStack() as stack:
            for name, provider in batch.items():
                stack.enter_context(provider.within())
                note = self._skipped(name) or self._prepare(case, name, provider, rows, known, ready)
                for of_provider in rows.values():
                    of_provider[name].note = note
            for at, (mode, of_mode) in enumerate(rows.items()):
                left = (begun + share - time.monotonic()) / (len(rows) - at)
                works = {name: found[mode] for name, found in ready.items()}
                try:
                    self._measure(case, of_mode, works, time.monotonic() + left)
                except Exception as failure:
                    for name in works:
                        of_mode[name].note = brief(failure)
        if any(name in COMPILED for name in batch):
            self._compiling += time.monotonic() - begun

    def _skipped(self, name: str) -> str:
        """Why a provider is passed over, if it is."""
        if self.timer.together:
            return ""
        if time.monotonic() >= self._end:
            return "skipped: the budget is spent"
        if name in COMPILED and not self.wanted and self._compiling > self._most_compiling:
            return f"skipped: {self._compiling:.0f} s were spent on compiled providers, the most that they may have"
        return ""

    def _prepare(
        self,
        case: Case,
        name: str,
        provider: Provider,
        rows: dict[str, dict[str, Row]],
        known: list[Tensor],
        ready: dict[str, dict[str, Work]],
    ) -> str:
        """Puts the calls of a provider that computes what it should into `ready`; else why it is not timed."""
        try:
            if name in COMPILED:
                torch._dynamo.reset()  # it compiles a function for a few shapes only, then runs it as it is
            works, results = prepared(case, provider.function, rows)
            off = error(case, results, known)
        except Exception as failure:  # a peer can fail in any way, and the others shall be measured
            return brief(failure)
        for of_provider in rows.values():
            of_provider[name].error = off
        most = OF_A_PEER if provider.peer else TOLERANCE[DTYPES[case.dtype].itemsize]
        if off > most:
            return f"wrong: {off:.1e} off, above {most:.0e}; not timed"
        ready[name] = works
        return ""

    def _measure(self, case: Case, rows: dict[str, Row], works: dict[str, Work], deadline: float) -> None:
        """Times the works in turn, on a CPU with the probe of their ceiling between them, and fills their rows in."""
        if not works:
            return
        turns: dict[str, tuple[Work, Prepare]] = {name: (work, case.prepare) for name, work in works.items()}
        if self.timer.together:
            turns[""] = (self.ceilings.probe(case.bound, DTYPES[case.dtype]), None)
        for work, prepare in turns.values():
            self.timer.milliseconds(work, prepare)  # warm up
        times = self.timer.turns(turns, self.repeats, self.timer.until(deadline))
        if "" in times:
            self.ceilings.note(case.bound, case.dtype, min(times.pop("")))
        for name, taken in times.items():
            rows[name].time(taken, self.timer.by)
            rows[name].add(self.timer.beside(works[name], case.prepare, self.repeats))

    def _providers(self, case: Case) -> dict[str, Provider]:
        """Those to measure, what torch.compile makes last."""
        usable = {name: provider for name, provider in case.providers().items() if not provider.why_not}
        if self.wanted:
            return {name: provider for name, provider in usable.items() if name in self.wanted}
        rows = [row for row in implementations(case.op) if row.name in usable]
        left_out = {"reference"} if [row.name for row in rows] != ["reference"] else set()
        if self.device == "cpu":
            left_out |= {"compile"}
        else:
            left_out |= {row.name for row in rows if row.serves} - {self._in_use(case)}
        names = sorted((name for name in usable if name not in left_out), key=lambda name: name in COMPILED)
        return {name: usable[name] for name in names}

    def _in_use(self, case: Case) -> str:
        if case.op in registry.OPS:
            return registry.choose(self.device, None, DTYPES[case.dtype]).names[case.op]
        return next((name for name, provider in case.providers().items() if not provider.why_not), "")


def brief(failure: BaseException) -> str:
    text = (str(failure).strip().splitlines() or [""])[0]
    return f"{type(failure).__name__}: {text[:140]}"
