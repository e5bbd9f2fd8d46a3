"""DualPipeV: forwards of one direction beside backwards of the other (DeepSeek-V3 2024; DeepSeek's DualPipe, "cut in
half").

Two chunks a rank on a V. In the main part each forward stands next to a backward of the other chunk, which a rank can
run at the same time, so that the messages of one hide behind the products of the other. Here they are neighbours in the
table, forward first. Where idle time remains, backwards are split into I and W.
"""

from collections import Counter, deque

from .actions import Action, Kind, Programs, ScheduleError


def dualpipev(ranks: int, chunks: int, micro_batches: int) -> Programs:
    """Programs of all ranks. Raises ScheduleError for fewer micro-batches than stages, 2p: there is no such order."""
    if micro_batches < 2 * ranks:
        fewer = f"micro_batches {2 * ranks}" + (f", ranks (pp) {micro_batches // 2}" if micro_batches > 1 else "")
        raise ScheduleError(
            f"schedule: 'dualpipev' needs a micro-batch for each of its stages, 2*ranks = 2*{ranks} = {2 * ranks}, not "
            f"{micro_batches}; nearest: {fewer}, or zbv"
        )
    return tuple(_program(rank, ranks, micro_batches) for rank in range(ranks))


def _program(rank: int, ranks: int, micro_batches: int) -> tuple[Action, ...]:
    program: list[Action] = []
    count: Counter[tuple[Kind, int]] = Counter()  # a B counts as an I
    delayed: deque[Action] = deque()
    after = ranks - rank - 1  # ranks behind this one

    def run(*actions: tuple[Kind, int]) -> None:
        """Each action for the next micro-batch it has not run for; an I leaves its W for later."""
        for kind, chunk in actions:
            counted: Kind = "F" if kind == "F" else "I"
            i = count[counted, chunk]
            count[counted, chunk] += 1
            program.append(Action(kind, chunk, i))
            if kind == "I":
                delayed.append(Action("W", chunk, i))

    def weights() -> None:
        """The oldest W that was left, if any."""
        if delayed:
            program.append(delayed.popleft())

    for _ in range(2 * after):
        run(("F", 0))
    for _ in range(rank + 1):
        run(("F", 0), ("F", 1))
    for _ in range(after):
        run(("I", 1))
        weights()
        run(("F", 1))
    for _ in range(micro_batches - 2 * ranks + rank + 1):
        run(("F", 0), ("B", 1), ("F", 1), ("B", 0))
    for _ in range(after):
        run(("B", 1), ("F", 1), ("B", 0))
    for k in range(2 * (rank + 1)):  # the later half splits
        run(("B" if k <= rank else "I", 1 - k % 2))
    for _ in range(after):
        weights()
        run(("I", 0))
    while delayed:
        weights()
    return tuple(program)
