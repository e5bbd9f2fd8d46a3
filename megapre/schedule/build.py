"""From a name to a schedule: one builder each, in a table.

p ranks, m micro-batches, v chunks a rank. A bubble is idle time over the time of the work, for forwards that take 1 and
backwards that take 2. Backwards of a chunk take the micro-batches in the order of the forwards, so that gradients add
up in the same order, and to the same bits, under every schedule; breadth_first alone turns it round.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .actions import Action, Placement, Programs, Schedule, ScheduleError
from .dualpipe import dualpipev
from .interleaved import interleaved, one_and_one
from .zero_bubble import zb_h1, zbv


@dataclass(frozen=True)
class Builder:
    """How a named schedule is made, and which chunks a rank it has an order for: from `least` to `most`."""

    programs: Callable[..., Programs]
    least: int = 1
    most: int | None = 1
    placement: Placement = "loop"
    options: tuple[str, ...] = ()


def build(
    name: str, ranks: int, chunks: int, micro_batches: int, group: int | None = None, **options: int | None
) -> Schedule:
    """The schedule `name` for `ranks` ranks of `chunks` chunks each and `micro_batches` micro-batches a step.

    `group` is interleaved's: micro-batches that pass a chunk before the next chunk's turn. None leaves an option to
    the builder. Raises ScheduleError for an unknown name or option, sizes below 1, or sizes the schedule has no order
    for.
    """
    if name not in BUILDERS:
        close = difflib.get_close_matches(name, BUILDERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ScheduleError(f"schedule: no schedule {name!r}; {hint}there are {', '.join(BUILDERS)}")
    for what, size in (("ranks", ranks), ("chunks", chunks), ("micro_batches", micro_batches)):
        if size < 1:
            raise ScheduleError(f"schedule: {what} = {size} must be at least 1")
    builder = BUILDERS[name]
    if chunks < builder.least or (builder.most is not None and chunks > builder.most):
        raise ScheduleError(f"schedule: {_chunks_refused(name, builder, chunks)}")
    given = {option: value for option, value in {"group": group, **options}.items() if value is not None}
    for option in given.keys() - set(builder.options):
        known = f"its options are {', '.join(builder.options)}" if builder.options else "it has none"
        raise ScheduleError(f"schedule: {name!r} has no option {option!r}; {known}")
    programs = builder.programs(ranks, chunks, micro_batches, **given)
    return Schedule(name, chunks, micro_batches, programs, builder.placement)


def _chunks_refused(name: str, builder: Builder, chunks: int) -> str:
    wanted = {1: "one chunk", 2: "two chunks"}[builder.least] + ("" if builder.most == builder.least else " or more")
    nearest = builder.least if chunks < builder.least else builder.most
    others = [
        other
        for other, row in BUILDERS.items()
        if row.least <= chunks and (row.most is None or chunks <= row.most) and other != name
    ]
    return (
        f"{name!r} orders {wanted} a rank, not {chunks}; nearest: chunks (vpp) {nearest}, or for {chunks} "
        f"{'chunk' if chunks == 1 else 'chunks'} {' or '.join(others)}"
    )


def gpipe(ranks: int, chunks: int, micro_batches: int) -> Programs:
    """All forwards, then all backwards (Huang et al. 2019). Bubble (p-1)/m for one chunk; all m are in flight."""
    forwards = [Action("F", chunk, i) for chunk in range(chunks) for i in range(micro_batches)]
    backwards = [Action("B", chunk, i) for chunk in reversed(range(chunks)) for i in range(micro_batches)]
    return (tuple(forwards + backwards),) * ranks


def one_forward_one_backward(ranks: int, chunks: int, micro_batches: int) -> Programs:
    """Rank r runs min(p-r-1, m) forwards, then forward and backward in turn, then drains (Narayanan et al. 2019).

    Bubble (p-1)/m as GPipe, but only min(p-r, m) micro-batches are in flight. On one rank: F0 B0 F1 B1 ..., which is
    gradient accumulation.
    """
    forwards = [Action("F", 0, i) for i in range(micro_batches)]
    backwards = [Action("B", 0, i) for i in range(micro_batches)]
    return tuple(one_and_one(forwards, backwards, min(ranks - rank - 1, micro_batches)) for rank in range(ranks))


def breadth_first(ranks: int, chunks: int, micro_batches: int) -> Programs:
    """All micro-batches through chunk 0, then through chunk 1, ...; then all the way back (Lamy-Poirier 2022).

    Bubble (p-1)/(v m), where m >= p; all m v are in flight. What a chunk's weights need, a gather before or a scatter
    after, is needed once for all micro-batches.
    """
    forwards = [Action("F", chunk, i) for chunk in range(chunks) for i in range(micro_batches)]
    backwards = [action._replace(kind="B") for action in reversed(forwards)]
    return (tuple(forwards + backwards),) * ranks


BUILDERS: Mapping[str, Builder] = {
    "gpipe": Builder(gpipe, most=None),
    "1f1b": Builder(one_forward_one_backward),
    "interleaved": Builder(interleaved, least=2, most=None, options=("group",)),
    "breadth_first": Builder(breadth_first, most=None),
    "zb_h1": Builder(zb_h1),
    "zbv": Builder(zbv, least=2, most=2, placement="v"),
    "dualpipev": Builder(dualpipev, least=2, most=2, placement="v"),
}
