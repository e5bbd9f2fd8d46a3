"""Schedules played by the rules, written apart from the code under test: one player for order, one for time."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque

from megapre.schedule import Action, Costs, Schedule


def text(program: tuple[Action, ...]) -> str:
    return " ".join(map(str, program))


def parse(*programs: str, placement: str = "loop") -> Schedule:
    """A schedule from its actions; chunks and micro-batches are those it names."""
    rows = tuple(
        tuple(Action(word[0], int(word.split(".")[1]), int(word[1:].split(".")[0])) for word in program.split())  # type: ignore[arg-type]
        for program in programs
    )
    chunks = 1 + max(action.chunk for row in rows for action in row)
    return Schedule("parsed", chunks, 1 + max(a.micro_batch for row in rows for a in row), rows, placement)  # type: ignore[arg-type]


def home(stage: int, ranks: int, placement: str) -> int:
    """Which rank holds a stage, by laying the stages out one after the other."""
    there = list(range(ranks))
    back = list(reversed(there)) if placement == "v" else there
    return ((there + back) * (stage // ranks + 1))[stage]


def stage_at(schedule: Schedule, rank: int, chunk: int) -> int:
    mine = [s for s in range(schedule.stages) if home(s, schedule.ranks, schedule.placement) == rank]
    return mine[chunk]


def runs(schedule: Schedule) -> bool:
    """Whether ranks that hand messages through queues come to the end, with everything done exactly once."""
    ranks, last = schedule.ranks, schedule.stages - 1
    queues: defaultdict[tuple[int, int, str], deque[tuple[int, int]]] = defaultdict(deque)
    there: list[set[tuple[str, int, int]]] = [set() for _ in range(ranks)]  # what each rank has, message or its own
    done: list[tuple[str, int, int]] = []
    position = [0] * ranks

    def step(rank: int) -> bool | None:
        """Runs the next action: True, or None where it must wait; False where it never can."""
        kind, chunk, i = schedule[rank][position[rank]]
        if chunk >= schedule.chunks or i >= schedule.micro_batches:
            return False
        stage, have = stage_at(schedule, rank, chunk), there[rank]
        if kind == "W":
            if ("I", stage, i) not in have:
                return False
            done.append(("W", stage, i))
            return True
        way, before, after = ("out", stage - 1, stage + 1) if kind == "F" else ("grad", stage + 1, stage - 1)
        if kind in "BI" and ("F", stage, i) not in have:
            return False
        if 0 <= before <= last:
            source = home(before, ranks, schedule.placement)
            if source == rank:
                if (way, before, i) not in have:
                    return False
            else:
                queue = queues[source, rank, way]
                if not queue:
                    return None
                if queue.popleft() != (before, i):
                    return False
        have |= {(kind, stage, i), (way, stage, i)}
        done.extend([("G", stage, i)] if kind == "I" else [("F" if kind == "F" else "G", stage, i)])
        done.extend([("W", stage, i)] if kind == "B" else [])
        if 0 <= after <= last and (target := home(after, ranks, schedule.placement)) != rank:
            queues[rank, target, way].append((stage, i))
        return True

    while True:
        moved = False
        for rank in range(ranks):
            if position[rank] < len(schedule[rank]):
                outcome = step(rank)
                if outcome is False:
                    return False
                position[rank] += outcome is True
                moved |= outcome is True
        if not moved:
            break
    if any(at < len(program) for at, program in zip(position, schedule, strict=True)):
        return False
    every = [(k, s, i) for k in "FGW" for s in range(schedule.stages) for i in range(schedule.micro_batches)]
    return sorted(done) == sorted(every) and not any(queues.values())


def times(schedule: Schedule, costs: Costs) -> dict[tuple[int, int], tuple[float, float]]:
    """Start and end of each (rank, position), by a queue of events: a rank falls free, a message leaves, arrives."""
    ranks, last = schedule.ranks, schedule.stages - 1
    found: dict[tuple[int, int], tuple[float, float]] = {}
    position, busy = [0] * ranks, [False] * ranks
    have: list[set[tuple[str, int, int]]] = [set() for _ in range(ranks)]
    wires: defaultdict[tuple[int, int], deque[tuple[float, tuple[str, int, int]]]] = defaultdict(deque)
    wire_busy: set[tuple[int, int]] = set()
    events: list[tuple[float, int, str, tuple]] = []
    order = iter(range(10**9))
    now = 0.0

    def later(when: float, what: str, *about: object) -> None:
        heapq.heappush(events, (when, next(order), what, about))

    def try_wire(wire: tuple[int, int]) -> None:
        if wires[wire] and wire not in wire_busy:
            seconds, message = wires[wire].popleft()
            wire_busy.add(wire)
            later(now + seconds, "left", wire)
            later(now + seconds + costs.latency, "arrived", wire[1], message)

    def try_rank(rank: int) -> None:
        if busy[rank] or position[rank] == len(schedule[rank]):
            return
        kind, chunk, i = schedule[rank][position[rank]]
        stage = stage_at(schedule, rank, chunk)
        way, before = ("out", stage - 1) if kind == "F" else ("grad", stage + 1)
        if kind != "W" and 0 <= before <= last and (way, before, i) not in have[rank]:
            return
        cost = {"F": costs.forward, "B": costs.backward, "I": costs.input, "W": costs.weights}[kind][stage]
        found[rank, position[rank]] = (now, now + cost)
        busy[rank] = True
        later(now + cost, "ended", rank, kind, stage, i)

    for rank in range(ranks):
        try_rank(rank)
    while events:
        now, _, what, about = heapq.heappop(events)
        if what == "left":
            wire_busy.discard(about[0])
            try_wire(about[0])
        elif what == "arrived":
            have[about[0]].add(about[1])
            try_rank(about[0])
        else:
            rank, kind, stage, i = about
            busy[rank] = False
            position[rank] += 1
            way, after, edge = ("out", stage + 1, stage) if kind == "F" else ("grad", stage - 1, stage - 1)
            have[rank].add((way, stage, i))
            if kind != "W" and 0 <= after <= last and (target := home(after, ranks, schedule.placement)) != rank:
                wires[rank, target].append((costs.message[edge] / costs.bandwidth, (way, stage, i)))
                try_wire((rank, target))
            try_rank(rank)
    return found
