"""Backwards in two halves: the weights' half waits until a rank would be idle (Qi et al. 2023, 2024).

The gradient of a stage's input (I) is what the stage before waits for. That of its weights (W) is needed only at the
end of the step, so it fills the bubbles. It keeps the activation until then.
"""

from collections import Counter

from .actions import Action, Kind, Programs


def zb_h1(ranks: int, chunks: int, micro_batches: int) -> Programs:
    """1F1B with W of micro-batch i after I of micro-batch i + r on rank r (Qi et al. 2023, section 2.1).

    Later ranks, which have fewer activations in flight, keep more of them for W: p on every rank. Where F, I and W take
    1 each the bubble is (p-1)/(3m), a third of 1F1B's.
    """
    programs: list[tuple[Action, ...]] = []
    for rank in range(ranks):
        warmup = min(ranks - rank - 1, micro_batches)
        program = [Action("F", 0, i) for i in range(warmup)]
        for i in range(micro_batches):
            if warmup + i < micro_batches:
                program.append(Action("F", 0, warmup + i))
            program.append(Action("I", 0, i))
            if i >= rank:
                program.append(Action("W", 0, i - rank))
        program += [Action("W", 0, i) for i in range(max(micro_batches - rank, 0), micro_batches)]
        programs.append(tuple(program))
    return tuple(programs)


def zbv(ranks: int, chunks: int, micro_batches: int) -> Programs:
    """Two chunks a rank on a V: rank 0 has both ends of the model, so its first backward comes early (Qi et al. 2024).

    In flight are p micro-batches' worth of both chunks, as in 1F1B, but on every rank. The order is written for
    m >= 2p - 1 micro-batches; with fewer, those that are not there are left out.
    """
    return tuple(_zbv_program(rank, ranks, micro_batches) for rank in range(ranks))


def _zbv_program(rank: int, ranks: int, micro_batches: int) -> tuple[Action, ...]:
    total = max(2 * ranks - 1, micro_batches)
    program: list[Action] = []
    count: Counter[tuple[Kind, int]] = Counter()

    def run(*actions: tuple[Kind, int]) -> None:
        """Each action for the next micro-batch it has not run for."""
        for kind, chunk in actions:
            if count[kind, chunk] < micro_batches:
                program.append(Action(kind, chunk, count[kind, chunk]))
            count[kind, chunk] += 1

    for _ in range(2 * (ranks - rank) - 1):
        run(("F", 0))
    for _ in range(rank):
        run(("F", 1), ("F", 0))
    for _ in range(ranks - rank):
        run(("F", 1), ("I", 1), ("W", 1))
    while count["F", 1] < total:
        if count["F", 0] < total:
            run(("F", 0))
        run(("I", 0), ("W", 0), ("F", 1), ("I", 1), ("W", 1))
    for _ in range(rank):
        run(("I", 0), ("I", 1))
    for _ in range(ranks - rank):
        run(("I", 0), ("W", 0))
    while count["W", 1] < total:
        run(("W", 1))
    while count["W", 0] < total:
        run(("W", 0))
    return tuple(program)
