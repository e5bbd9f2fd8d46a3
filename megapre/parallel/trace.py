"""When each action of a step really ran: recorded on each rank, gathered, and laid beside the simulation.

Recording costs two or three looks at the clock an action, on CUDA as many events, and one small all-reduce before the
step: its end is time zero on all ranks, to within what it takes to spread (clocks of machines need not agree).

What was measured is a `Timeline`, as a simulation gives it, so whatever draws the one draws the other. Its costs are
the mean times of each stage's actions, and simulating the schedule with these tells what the schedule itself loses;
what the measured step loses beyond is communication and unevenness in time.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from megapre.schedule import Action, Costs, Schedule, Timeline, simulate
from megapre.schedule.trace import trace as events_of

from .comm import Group

if TYPE_CHECKING:
    from .pipeline import Executor


class Record(NamedTuple):
    """One action on one rank, in seconds from the beginning of the step; it waited for its input before `start`."""

    action: Action
    start: float
    end: float
    waiting: float


class Phase(NamedTuple):
    """What a rank did after the pipeline's actions, in seconds from the beginning of the step."""

    name: str
    start: float
    end: float


class Trace:
    """The clock of one step. To be made by all ranks of `group` right before the step, and given to `Executor.run`;
    what comes after that is told by `phase`.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._phases: list[tuple[str, Any]] = []
        if group.size > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=group.handle)
        self.mark()

    def mark(self) -> None:
        """Called by the executor: before an action waits for its input, before it begins, and when it has ended."""
        self._marks.append(self._now())

    def phase(self, name: str) -> None:
        """What begins now is called `name`, until the next one begins. To be ended by the phase ""."""
        self._phases.append((name, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, marks: Iterable[Any]) -> list[float]:
        """From the beginning of the step to each of `marks`. On CUDA waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            return [self._marks[0].elapsed_time(mark) / 1e3 for mark in marks]
        return [mark - self._marks[0] for mark in marks]

    def phases(self) -> list[Phase]:
        """What was done after the actions. On CUDA waits for the device."""
        times = self._seconds(mark for _, mark in self._phases)
        spans = zip(self._phases, times, times[1:], strict=False)
        return [Phase(name, start, end) for (name, _), start, end in spans if name]

    def records(self, executor: Executor) -> list[Record]:
        """The actions. On CUDA waits for the device."""
        times = self._seconds(self._marks)
        before, starts, ends = times[1::3], times[2::3], times[3::3]
        actions = [step.action for step in executor.steps]
        return [
            Record(action, start, end, start - ready)
            for action, ready, start, end in zip(actions, before, starts, ends, strict=True)
        ]


def gather(records: Sequence[Record], group: Group) -> list[list[Record]]:
    """The records of all ranks of `group`, by rank, on each of them."""
    if group.size == 1:
        return [list(records)]
    all_records: list[Any] = [None] * group.size
    dist.all_gather_object(all_records, list(records), group=group.handle)
    return all_records


def measured(schedule: Schedule, records: Sequence[Sequence[Record]], begin: float | None = None) -> Timeline:
    """The timeline of a whole training step, from the records of the pipeline's ranks; its time 0 is `begin`, or when
    the first action began.
    """
    begin = min(record.start for row in records for record in row) if begin is None else begin
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for rank, row in enumerate(records):
        assert tuple(record.action for record in row) == schedule[rank], f"rank {rank} ran another row"
        for (kind, chunk, _), start, end, _ in row:
            times[kind, schedule.stage_of(rank, chunk)].append(end - start)

    def mean(kind: str) -> list[float]:
        return [fmean(times.get((kind, stage), [0.0])) for stage in range(schedule.stages)]

    costs = Costs.of(schedule.stages, mean("F"), mean("I"), mean("W"), mean("B"))
    starts = tuple([record.start - begin for record in row] for row in records)
    ends = tuple([record.end - begin for record in row] for row in records)
    return Timeline(schedule, costs, starts, ends)


def simulated(timeline: Timeline) -> Timeline:
    """The same schedule as the simulation has it, with the costs of `timeline` and messages that take no time."""
    return simulate(timeline.schedule, timeline.costs)


def write(
    timelines: Mapping[str, Timeline], path: str | Path, phases: Mapping[str, Sequence[Sequence[Phase]]] | None = None
) -> None:
    """One file for Perfetto (ui.perfetto.dev): under each name a timeline, from the same time zero, and by the same
    name the phases of its ranks.

    Such as {"measured": timeline, "simulated": simulated(timeline)}, or the pipelines of several data-parallel ranks.
    """
    phases = phases or {}
    events = []
    for number, (name, timeline) in enumerate(timelines.items()):
        for event in events_of(timeline):
            if event["name"] == "process_name":
                event = event | {"args": {"name": f"{timeline.schedule.name}, {name}"}}
            events.append(event | {"pid": number})
        for rank, spans in enumerate(phases.get(name, ())):
            for phase in spans:
                about = {"ts": phase.start * 1e6, "dur": (phase.end - phase.start) * 1e6, "name": phase.name}
                events.append({"ph": "X", "pid": number, "tid": rank, "cat": "end of the step", **about})
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
