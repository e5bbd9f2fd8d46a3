"""All schedules for one layout, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UserError
from .actions import Schedule, ScheduleError
from .build import BUILDERS, build
from .routes import routes
from .simulate import Costs, Timeline, simulate


@dataclass(frozen=True)
class Row:
    """One schedule: its timeline, or why there is none."""

    name: str
    chunks: int
    timeline: Timeline | None
    memory: float | None = None
    """Bytes of the fullest rank, where they are known."""
    exposed: float = 0.0
    """Time of a step beside the timeline: of the communication among replicas what nothing hides."""
    refused: str = ""

    @property
    def step(self) -> float:
        """Time of a whole step."""
        return 0.0 if self.timeline is None else self.timeline.makespan + self.exposed

    @property
    def in_flight(self) -> float:
        """Most activations of a rank, in micro-batches' worth of all its chunks."""
        return 0.0 if self.timeline is None else max(self.timeline.in_flight) / self.chunks

    @property
    def messages(self) -> int:
        """That the busiest rank sends."""
        return 0 if self.timeline is None else max(_messages(self.timeline.schedule))


def compare(
    ranks: int,
    micro_batches: int,
    chunks: Sequence[int],
    costs: Callable[[Schedule], Costs],
    memory: Callable[[Schedule], float] | None = None,
    exposed: Callable[[Timeline], float] | None = None,
    group: int | None = None,
) -> list[Row]:
    """A row for every schedule and each of `chunks` it has an order for, or its own least number of them.

    `costs` gives those of the model cut into a schedule's stages, `memory` the bytes of its fullest rank, and `exposed`
    what its step takes beside the timeline. A UserError of one of them, or of the builder, becomes a row that says so.
    """
    rows: list[Row] = []
    for name, builder in BUILDERS.items():
        fitting = [c for c in sorted(set(chunks)) if builder.least <= c and (builder.most is None or c <= builder.most)]
        for count in [1] if name == "gpipe" else fitting or [builder.least]:
            try:
                option = group if "group" in builder.options else None
                schedule = build(name, ranks, count, micro_batches, group=option)
                timeline = simulate(schedule, costs(schedule))
                held, more = memory(schedule) if memory else None, exposed(timeline) if exposed else 0.0
                rows.append(Row(name, count, timeline, held, more))
            except UserError as error:
                rows.append(Row(name, count, None, refused=str(error).removeprefix("schedule: ")))
    return rows


def best(rows: Sequence[Row], in_flight: float | None = None, memory: float | None = None) -> Row:
    """The quickest row within the limits, in micro-batches' worth and bytes; of equals the one that holds less.

    Raises ScheduleError where none is within them.
    """
    built = [row for row in rows if row.timeline is not None]
    if not built:
        raise ScheduleError("compare: no schedule can be built; each row says why")
    within = [row for row in built if _within(row, in_flight, memory)]
    if not within:
        least = min(built, key=lambda row: (row.memory or 0.0, row.in_flight))
        limit = f"{memory:,.0f} bytes" if memory is not None else f"{in_flight:g} micro-batches in flight"
        has = f"{least.memory:,.0f} bytes" if memory is not None else f"{least.in_flight:g}"
        raise ScheduleError(f"compare: no schedule is within {limit}; the least is {least.name} with {has}")
    return min(within, key=lambda row: (round(row.step, 9), row.in_flight))


def _within(row: Row, in_flight: float | None, memory: float | None) -> bool:
    if memory is not None and (row.memory is None or row.memory > memory):
        return False
    return in_flight is None or row.in_flight <= in_flight


def _messages(schedule: Schedule) -> list[int]:
    table = routes(schedule)
    return [
        sum(own[kind][chunk].target is not None for kind, chunk, _ in program)
        for program, own in zip(schedule, table, strict=True)
    ]
