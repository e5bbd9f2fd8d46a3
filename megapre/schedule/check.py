"""Whether a schedule can run: complete, in an order that respects what depends on what, and free of deadlock.

What is assumed of the executor: a rank runs its actions in order; an action first receives its input, waiting until the
peer has sent it, and sends its output without waiting; from one rank to another there is one first-in-first-out channel
for activations and gradients together, so the k-th message sent is the k-th received.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from .actions import Action, Schedule, stage_of


class Work(NamedTuple):
    """An action without the rank: a stage's forward or backward of one micro-batch."""

    kind: str
    stage: int
    micro_batch: int


def check(schedule: Schedule, chunks: int, micro_batches: int) -> list[str]:
    """What is wrong with the schedule, a line for each problem; empty if it can run."""
    problems = list(_incomplete(schedule, chunks, micro_batches))
    if problems:
        return problems  # what follows speaks of actions that must be there
    return [*_misordered(schedule, chunks), *_stuck(schedule, chunks)]


def peak_in_flight(program: Sequence[Action]) -> int:
    """Most forwards whose backward has not run yet, at any time, on a rank with these actions."""
    held = peak = 0
    for action in program:
        held += {"F": 1, "B": -1}[action.kind]
        peak = max(peak, held)
    return peak


def _incomplete(schedule: Schedule, chunks: int, micro_batches: int) -> Iterator[str]:
    """Every forward and backward exactly once on its rank, and nothing else."""
    expected = {Action(kind, c, i) for kind in ("F", "B") for c in range(chunks) for i in range(micro_batches)}
    if not schedule:
        yield "no ranks"
    for rank, program in enumerate(schedule):
        counts = Counter(program)
        for action in sorted(expected - counts.keys()):
            yield f"rank {rank}: {action} is missing"
        for action in sorted(counts.keys() - expected):
            yield f"rank {rank}: {action} is not of {chunks} chunks and {micro_batches} micro-batches"
        for action, count in counts.items():
            if action in expected and count > 1:
                yield f"rank {rank}: {action} comes {count} times"


def _needs(work: Work, stages: int) -> list[Work]:
    """What must have run before: the forward of the stage before; for a backward, the own forward and the backward of
    the stage after.
    """
    kind, stage, i = work
    if kind == "F":
        return [Work("F", stage - 1, i)] if stage > 0 else []
    return [Work("F", stage, i), *([Work("B", stage + 1, i)] if stage + 1 < stages else [])]


def _misordered(schedule: Schedule, chunks: int) -> Iterator[str]:
    """On each channel, messages are sent in the order in which they are received."""
    ranks = len(schedule)
    stages = ranks * chunks
    sent: defaultdict[tuple[int, int], list[Work]] = defaultdict(list)
    received: defaultdict[tuple[int, int], list[Work]] = defaultdict(list)
    for rank, program in enumerate(schedule):
        for action in program:
            work = Work(action.kind, stage_of(rank, action.chunk, ranks), action.micro_batch)
            for need in _needs(work, stages):
                if need.stage % ranks != rank:
                    received[need.stage % ranks, rank].append(need)
            target = work.stage + (1 if work.kind == "F" else -1)
            if 0 <= target < stages and target % ranks != rank:
                sent[rank, target % ranks].append(work)
    for source, target in sorted(sent.keys() | received.keys()):
        pairs = zip_longest(sent[source, target], received[source, target])
        for k, (given, wanted) in enumerate(pairs):
            if given != wanted:
                yield (
                    f"rank {source} to rank {target}: message {k} is sent as {_name(given, ranks)} and received as "
                    f"{_name(wanted, ranks)}"
                )
                break  # later messages of the channel are shifted by this one


def _stuck(schedule: Schedule, chunks: int) -> Iterator[str]:
    """Let every rank run as far as it can; whoever does not reach its end waits for ever."""
    ranks = len(schedule)
    stages = ranks * chunks
    done: set[Work] = set()
    position = [0] * ranks
    waiting: defaultdict[Work, list[int]] = defaultdict(list)
    ready = list(range(ranks))
    while ready:
        rank = ready.pop()
        program = schedule[rank]
        while position[rank] < len(program):
            action = program[position[rank]]
            work = Work(action.kind, stage_of(rank, action.chunk, ranks), action.micro_batch)
            missing = next((need for need in _needs(work, stages) if need not in done), None)
            if missing is not None:
                waiting[missing].append(rank)
                break
            done.add(work)
            position[rank] += 1
            ready += waiting.pop(work, [])
    for missing, blocked in sorted(waiting.items()):
        for rank in blocked:
            yield (
                f"rank {rank} waits for ever at action {position[rank]} ({schedule[rank][position[rank]]}) for "
                f"{_name(missing, ranks)} of rank {missing.stage % ranks}"
            )


def _name(work: Work | None, ranks: int) -> str:
    return "nothing" if work is None else f"{work.kind}{work.micro_batch}.{work.stage // ranks}"
