"""The schedule of a run, by the name of its builder or from a file."""

from .actions import Placement, Schedule, ScheduleError
from .build import BUILDERS, build
from .check import checked
from .files import read


def named(name: str, ranks: int, chunks: int, micro_batches: int, group: int | None = None) -> Schedule:
    """What a builder makes, or the file of that name holds: for so many ranks, chunks a rank and micro-batches a step.

    Raises ScheduleError as `build` does, and for a file that cannot be read, is for other sizes, or cannot run.
    """
    if name in BUILDERS:
        return build(name, ranks, chunks, micro_batches, group=group)
    found = read(name)
    sizes = (
        ("ranks", "layout.pp", found.ranks, ranks),
        ("chunks a rank", "layout.vpp", found.chunks, chunks),
        ("micro-batches", "batch.global / (batch.micro * dp)", found.micro_batches, micro_batches),
    )
    wrong = [f"{holds} {what}, but {knob} = {wanted}" for what, knob, holds, wanted in sizes if holds != wanted]
    if wrong:
        nearest = f"layout.pp={found.ranks} layout.vpp={found.chunks} and {found.micro_batches} micro-batches a step"
        raise ScheduleError(f"schedule {name}: is for {'; for '.join(wrong)}; nearest: {nearest}, or another file")
    return checked(found)


def placement_of(name: str) -> Placement:
    """Where the stages of the schedule lie that a builder of that name makes, or a file holds. Raises ScheduleError."""
    return BUILDERS[name].placement if name in BUILDERS else read(name).placement
