"""1F1B over several chunks a rank, in Megatron-LM's order (Narayanan et al. 2021).

Micro-batches go in groups of g. A group passes chunk 0, then chunk 1, ..., before the next group begins; the last group
may be smaller. That gives one list of (micro-batch, chunk) for the forwards, and with chunk v-1-c in place of c one for
the backwards. Rank r runs the first 2(p-r-1) + (v-1)g forwards, then a forward and a backward in turn, then what is
left of the backwards.

The bubble is (p-1)/(v m): v times smaller than that of 1F1B for v times the messages. A larger g leaves a message g - p
actions of time to arrive in, and keeps (v-1)(g-p) more activations.
"""

from collections.abc import Sequence
from itertools import chain

from .actions import Action, Programs, ScheduleError


def interleaved(ranks: int, chunks: int, micro_batches: int, group: int | None = None) -> Programs:
    """Programs of all ranks. `group` is g; None takes the smallest that is allowed. Raises ScheduleError for another.

    Allowed are groups of at least p, and the last one too: a smaller group would reach its next chunk before its first
    micro-batch is back from the last rank. Fewer than p micro-batches are one group.
    """
    g = smallest_group(ranks, micro_batches) if group is None else group
    if not _allowed(g, ranks, micro_batches):
        allowed = [size for size in range(1, micro_batches + 1) if _allowed(size, ranks, micro_batches)]
        nearest = sorted(sorted(allowed, key=lambda size: (abs(size - g), size))[:2])
        rest = f", {micro_batches % g} left over" if g > 0 and micro_batches % g else ""
        needs = (
            f"all {micro_batches} are one group, for they are no more than the ranks"
            if micro_batches <= ranks
            else f"each group, the last one too, needs {ranks} to {micro_batches}"
        )
        raise ScheduleError(
            f"schedule: interleaved cannot run {micro_batches} micro-batches over {ranks} ranks in groups of {g}{rest}"
            f": {needs}; nearest: group {' or '.join(map(str, nearest))}"
        )
    order = [
        (i, chunk)
        for first in range(0, micro_batches, g)
        for chunk in range(chunks)
        for i in range(first, min(first + g, micro_batches))
    ]
    forwards = [Action("F", chunk, i) for i, chunk in order]
    backwards = [Action("B", chunks - 1 - chunk, i) for i, chunk in order]
    return tuple(
        one_and_one(forwards, backwards, min(2 * (ranks - rank - 1) + (chunks - 1) * g, len(order)))
        for rank in range(ranks)
    )


def smallest_group(ranks: int, micro_batches: int) -> int:
    """The smallest group that interleaved allows: p where p divides m."""
    return next(g for g in range(min(ranks, micro_batches), micro_batches + 1) if _allowed(g, ranks, micro_batches))


def _allowed(group: int, ranks: int, micro_batches: int) -> bool:
    if micro_batches <= ranks:
        return group == micro_batches
    return ranks <= group <= micro_batches and (micro_batches % group == 0 or micro_batches % group >= ranks)


def one_and_one(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> tuple[Action, ...]:
    """`warmup` forwards, then forward and backward in turn, then the remaining backwards."""
    pairs = chain.from_iterable(zip(forwards[warmup:], backwards, strict=False))
    return (*forwards[:warmup], *pairs, *backwards[len(forwards) - warmup :])
