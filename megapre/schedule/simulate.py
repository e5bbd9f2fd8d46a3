"""How long a schedule takes: every action as early as its rank and its input allow.

A rank runs its actions in order, one at a time. Messages travel beside the work: from one rank to another they leave
one after the other, each holding the link for bytes / bandwidth, and arrive `latency` later. A stage's output stays on
its rank where the next stage lies there too.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from .actions import Kind, Schedule, ScheduleError
from .held import Kept, peak_in_flight, peak_kept
from .routes import event_name, routes


@dataclass(frozen=True)
class Costs:
    """What each stage takes, in seconds (or any one unit), and what its messages and activations weigh, in bytes.

    `backward` is B; `input` and `weights` are its halves I and W. A message is the output of a stage or its gradient.
    `kept` is the activation that a stage keeps of a micro-batch until its B or I, `kept_for_weights` what of it is left
    from I to W.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    input: tuple[float, ...]
    weights: tuple[float, ...]
    message: tuple[float, ...]
    kept: tuple[float, ...]
    kept_for_weights: tuple[float, ...]
    latency: float = 0.0
    bandwidth: float = math.inf

    @classmethod
    def of(
        cls,
        stages: int,
        forward: float | Sequence[float] = 1.0,
        input: float | Sequence[float] = 1.0,
        weights: float | Sequence[float] = 1.0,
        backward: float | Sequence[float] | None = None,
        message: float | Sequence[float] = 0.0,
        kept: float | Sequence[float] = 0.0,
        kept_for_weights: float | Sequence[float] | None = None,
        latency: float = 0.0,
        bandwidth: float = math.inf,
    ) -> Self:
        """Costs where a number stands for all stages; `backward` is input + weights and `kept_for_weights` is `kept`
        unless they are given. Raises ScheduleError for a list of another length, or what is negative or not a number.
        """

        def each(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
            values = (float(value),) * stages if isinstance(value, int | float) else tuple(map(float, value))
            if len(values) != stages:
                raise ScheduleError(
                    f"costs: {name} has {len(values)} numbers for {stages} stages; give one, or {stages}"
                )
            if not all(0 <= number < math.inf for number in values):
                raise ScheduleError(f"costs: {name} = {values} holds a number below 0 or none")
            return values

        if not (0 <= latency < math.inf and bandwidth > 0):
            raise ScheduleError(f"costs: latency = {latency} must be at least 0, and bandwidth = {bandwidth} above 0")
        of_input, of_weights = each("input", input), each("weights", weights)
        both = [a + b for a, b in zip(of_input, of_weights, strict=True)]
        return cls(
            each("forward", forward),
            each("backward", both if backward is None else backward),
            of_input,
            of_weights,
            each("message", message),
            each("kept", kept),
            each("kept_for_weights", kept if kept_for_weights is None else kept_for_weights),
            latency,
            bandwidth,
        )

    @property
    def times(self) -> Mapping[Kind, tuple[float, ...]]:
        """What each kind of action takes, by stage."""
        return {"F": self.forward, "B": self.backward, "I": self.input, "W": self.weights}


@dataclass(frozen=True)
class Timeline:
    """When each action of `schedule` runs. `starts[r][k]` and `ends[r][k]` are those of `schedule[r][k]`."""

    schedule: Schedule
    costs: Costs
    starts: tuple[Sequence[float], ...]
    ends: tuple[Sequence[float], ...]

    @cached_property
    def makespan(self) -> float:
        """End of the last action."""
        return max(end[-1] for end in self.ends)

    @cached_property
    def work(self) -> tuple[float, ...]:
        """Time for which each rank is busy."""
        return tuple(
            math.fsum(end - start for start, end in zip(*pair, strict=True))
            for pair in zip(self.starts, self.ends, strict=True)
        )

    @property
    def bubble(self) -> float:
        """Time that the busiest rank loses, over the time of its work."""
        most = max(self.work)
        return (self.makespan - most) / most if most else 0.0

    @property
    def idle(self) -> float:
        """Share of all ranks' time in which nothing runs. With equal work, bubble / (1 + bubble)."""
        whole = self.schedule.ranks * self.makespan
        return 1 - math.fsum(self.work) / whole if whole else 0.0

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """Most activations that each rank holds, in chunks' worth."""
        return tuple(map(peak_in_flight, self.schedule))

    @cached_property
    def kept(self) -> tuple[float, ...]:
        """Most bytes of activations that each rank holds."""
        stages = list(map(Kept, self.costs.kept, self.costs.kept_for_weights))
        chunks = range(self.schedule.chunks)
        return tuple(
            peak_kept(program, [stages[self.schedule.stage_of(rank, chunk)] for chunk in chunks]).kept
            for rank, program in enumerate(self.schedule)
        )

    @cached_property
    def sent(self) -> tuple[float, ...]:
        """Bytes that each rank sends."""
        table, message = routes(self.schedule), self.costs.message
        return tuple(
            math.fsum(
                message[_boundary(kind, own[kind][chunk].stage)]
                for kind, chunk, _ in program
                if own[kind][chunk].target is not None
            )
            for program, own in zip(self.schedule, table, strict=True)
        )


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """The timeline of a schedule that passes `check`. Raises ScheduleError where it stops, or for costs of another
    number of stages.
    """
    stages, m = schedule.stages, schedule.micro_batches
    if len(costs.forward) != stages:
        raise ScheduleError(
            f"simulate: costs of {len(costs.forward)} stages for a schedule of {schedule.ranks} ranks * "
            f"{schedule.chunks} chunks = {stages} stages"
        )
    table, takes = routes(schedule), costs.times
    on_link = [size / costs.bandwidth for size in costs.message]
    arrival = array("d", [-1.0]) * (3 * stages * m)  # of each event at the rank that takes it
    starts: tuple[array[float], ...] = tuple(array("d") for _ in schedule)
    ends: tuple[array[float], ...] = tuple(array("d") for _ in schedule)
    link_free: dict[tuple[int, int], float] = {}
    waiting: dict[int, list[int]] = {}
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        program, own, start_of, end_of = schedule[rank], table[rank], starts[rank], ends[rank]
        clock = end_of[-1] if end_of else 0.0
        for at in range(len(end_of), len(program)):
            kind, chunk, i = program[at]
            route = own[kind][chunk]
            missing = [need + i for need in route.needs if arrival[need + i] < 0]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            if route.takes is not None and arrival[route.takes + i] > clock:
                clock = arrival[route.takes + i]
            start_of.append(clock)
            clock += takes[kind][route.stage]
            end_of.append(clock)
            event = route.event + i
            if route.target is None:
                arrival[event] = clock
            else:
                link = rank, route.target
                free = max(clock, link_free.get(link, 0.0)) + on_link[_boundary(kind, route.stage)]
                link_free[link] = free
                arrival[event] = free + costs.latency
            if event in waiting:
                ready += waiting.pop(event)
    if waiting:
        rank, event = min((rank, event) for event, ranks in waiting.items() for rank in ranks)
        at, (name, peer) = len(ends[rank]), event_name(event, schedule)
        raise ScheduleError(
            f"simulate: rank {rank} waits for ever at action {at} ({schedule[rank][at]}) for {name} of rank {peer}; "
            f"`check` names all problems"
        )
    return Timeline(schedule, costs, starts, ends)


def _boundary(kind: str, stage: int) -> int:
    """The stage whose output, or whose output's gradient, an action of `stage` sends."""
    return stage if kind == "F" else stage - 1
