"""From a name to a schedule: one builder each, in a table."""

import difflib
from collections.abc import Callable, Mapping

from .actions import Action, Schedule, ScheduleError

Builder = Callable[[int, int, int], Schedule]


def build(name: str, ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """The schedule `name` for `ranks` ranks of `chunks` chunks each and `micro_batches` micro-batches a step.

    Raises ScheduleError for an unknown name, sizes below 1, or chunks the schedule has no order for.
    """
    if name not in BUILDERS:
        close = difflib.get_close_matches(name, BUILDERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ScheduleError(f"schedule: no schedule {name!r}; {hint}there are {', '.join(BUILDERS)}")
    for what, size in (("ranks", ranks), ("chunks", chunks), ("micro_batches", micro_batches)):
        if size < 1:
            raise ScheduleError(f"schedule: {what} = {size} must be at least 1")
    return BUILDERS[name](ranks, chunks, micro_batches)


def gpipe(ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019). Bubble (p-1)/m for one chunk; all m are in flight.

    Backwards take the micro-batches in the order of the forwards, so that gradients add up in the same order, and to
    the same bits, as under 1F1B.
    """
    forwards = [Action("F", chunk, i) for chunk in range(chunks) for i in range(micro_batches)]
    backwards = [Action("B", chunk, i) for chunk in reversed(range(chunks)) for i in range(micro_batches)]
    return tuple(tuple(forwards + backwards) for _ in range(ranks))


def one_forward_one_backward(ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """Rank r runs min(p-r-1, m) forwards, then forward and backward in turn, then drains (Narayanan et al. 2019).

    Bubble (p-1)/m as GPipe, but only min(p-r, m) micro-batches are in flight. On one rank: F0 B0 F1 B1 ..., which is
    gradient accumulation.
    """
    if chunks != 1:
        raise ScheduleError(f"schedule: '1f1b' orders one chunk a rank, not {chunks}; nearest: chunks (vpp) 1")
    programs: list[tuple[Action, ...]] = []
    for rank in range(ranks):
        warmup = min(ranks - rank - 1, micro_batches)
        program = [Action("F", 0, i) for i in range(warmup)]
        for i in range(micro_batches - warmup):
            program += [Action("F", 0, warmup + i), Action("B", 0, i)]
        program += [Action("B", 0, i) for i in range(micro_batches - warmup, micro_batches)]
        programs.append(tuple(program))
    return tuple(programs)


BUILDERS: Mapping[str, Builder] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
