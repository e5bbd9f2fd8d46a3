"""What an action waits for and what it sends to whom: the dependencies that checker, simulator and executor share.

What an action brings about is an event: the output of a stage (F), the gradient of its input (B or I), the gradient of
its weights (W), for one micro-batch. Events are numbered, (phase * stages + stage) * m + i, so that tables of them are
flat. A rank does the same for all micro-batches, so a route is worked out once for each kind and chunk, and the numbers
in it are those of micro-batch 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from .actions import KINDS, Kind, Schedule

OUTPUT, GRADIENT, WEIGHTS = range(3)
PHASE: Mapping[Kind, int] = {"F": OUTPUT, "B": GRADIENT, "I": GRADIENT, "W": WEIGHTS}


@dataclass(frozen=True, slots=True)
class Route:
    """Of all actions of one kind and chunk on one rank. Events are those of micro-batch 0; add i for micro-batch i."""

    stage: int
    event: int
    """What the action brings about."""
    needs: tuple[int, ...]
    """Events that must be there before."""
    takes: int | None
    """The one of `needs` that comes from another stage, if any."""
    source: int | None
    """The rank that sends `takes`; None where this rank made it itself."""
    target: int | None
    """The rank to which the event is sent; None where it stays."""


Routes: TypeAlias = tuple[Mapping[Kind, tuple[Route, ...]], ...]
"""routes[rank][kind][chunk]."""


def routes(schedule: Schedule) -> Routes:
    """Of every rank, kind and chunk."""
    return tuple(
        {kind: tuple(_route(schedule, rank, kind, chunk) for chunk in range(schedule.chunks)) for kind in KINDS}
        for rank in range(schedule.ranks)
    )


def event_name(event: int, schedule: Schedule) -> tuple[str, int]:
    """An event as text, as the action that brings it about, and the rank where."""
    rest, micro_batch = divmod(event, schedule.micro_batches)
    phase, stage = divmod(rest, schedule.stages)
    rank, chunk = schedule.holder(stage)
    return f"{('F', 'B', 'W')[phase]}{micro_batch}.{chunk}", rank


def _route(schedule: Schedule, rank: int, kind: Kind, chunk: int) -> Route:
    stage, last = schedule.stage_of(rank, chunk), schedule.stages - 1

    def event(phase: int, stage: int) -> int:
        return (phase * schedule.stages + stage) * schedule.micro_batches

    def elsewhere(stage: int) -> int | None:
        holder = schedule.holder(stage)[0]
        return None if holder == rank else holder

    own = event(PHASE[kind], stage)
    if kind == "W":
        return Route(stage, own, (event(GRADIENT, stage),), None, None, None)
    before, after = (stage - 1, stage + 1) if kind == "F" else (stage + 1, stage - 1)
    takes = event(PHASE[kind], before) if 0 <= before <= last else None
    return Route(
        stage=stage,
        event=own,
        needs=(*(() if kind == "F" else (event(OUTPUT, stage),)), *(() if takes is None else (takes,))),
        takes=takes,
        source=None if takes is None else elsewhere(before),
        target=elsewhere(after) if 0 <= after <= last else None,
    )
