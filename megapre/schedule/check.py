"""Whether a schedule can run: complete, in an order that respects what depends on what, and free of deadlock.

What is assumed of the executor: a rank runs its actions in order; an action first receives its input, waiting until the
peer has sent it, and sends its output without waiting. What a peer sends is received in the order in which it sends, by
megapre.parallel.handover: what comes before the message in want waits in memory for its action. So one channel from a
rank to a rank does for activations and gradients, though on two ranks interleaved may send a gradient before an
activation and want it after, and on a V both travel from each rank to each neighbour. Among the activations, and among
the gradients, such waiting is refused here: it takes memory, and it shows that two ranks disagree on an order.

An activation is kept from its F to its B or W (held.py). A schedule in which every action comes once and nothing waits
for ever therefore frees all of them by its end.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from typing import TypeAlias

from .actions import Action, Schedule, ScheduleError
from .held import HELD
from .routes import OUTPUT, PHASE, Routes, event_name, routes

Channel: TypeAlias = tuple[int, int, int]
"""From a rank to a rank, of outputs or of gradients. In memory: on the wire both kinds go one after the other."""

SHOWN = 10
"""Problems that an error names."""


def check(schedule: Schedule, in_flight: int | None = None, unreceived: int | None = None) -> list[str]:
    """What is wrong with the schedule, a line for each problem; empty if it can run.

    in_flight: most activations that a rank may hold. unreceived: messages of a kind that may be on their way to a rank,
    or wait there, before the sender has to wait until one is taken; 0 is a rendezvous, None, as the executor has it, no
    limit.
    """
    problems = list(_incomplete(schedule))
    if problems:
        return problems  # what follows speaks of actions that must be there
    table = routes(schedule)
    problems = [*_misordered(schedule, table), *_stuck(schedule, table, unreceived)]
    return problems if in_flight is None else [*problems, *_overfull(schedule, in_flight)]


def checked(schedule: Schedule) -> Schedule:
    """The schedule itself. Raises ScheduleError with what is wrong where `check` objects."""
    if problems := check(schedule):
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = [f"  - {line}" for line in [*problems[:SHOWN], *more]]
        raise ScheduleError("\n".join([f"schedule {schedule.name!r} cannot run:", *lines]))
    return schedule


def _incomplete(schedule: Schedule) -> Iterator[str]:
    """Every forward, and every backward whole or in both halves, exactly once on its rank, and nothing else."""
    if not schedule.programs:
        yield "no ranks"
    places = [(c, i) for c in range(schedule.chunks) for i in range(schedule.micro_batches)]
    quartets = [tuple(Action(kind, *place) for kind in ("F", "B", "I", "W")) for place in places]
    known = {action for quartet in quartets for action in quartet}
    for rank, program in enumerate(schedule):
        counts = Counter(program)
        for forward, whole, of_input, of_weights in quartets:
            if forward not in counts:
                yield f"rank {rank}: {forward} is missing"
            if whole in counts:
                for half in (of_input, of_weights):
                    if half in counts:
                        yield f"rank {rank}: {half} comes beside {whole}, which contains it"
            elif of_input in counts or of_weights in counts:
                for half, other in ((of_input, of_weights), (of_weights, of_input)):
                    if half not in counts:
                        yield f"rank {rank}: {half} is missing ({other} is there)"
            else:
                yield f"rank {rank}: {whole} is missing"
        for action in sorted(counts.keys() - known):
            yield f"rank {rank}: {action} is not of {schedule.chunks} chunks and {schedule.micro_batches} micro-batches"
        for action, count in counts.items():
            if count > 1 and action in known:
                yield f"rank {rank}: {action} comes {count} times"


def _misordered(schedule: Schedule, table: Routes) -> Iterator[str]:
    """From a rank to a rank, messages of one kind are sent in the order in which they are taken."""
    sent: defaultdict[Channel, list[int]] = defaultdict(list)
    received: defaultdict[Channel, list[int]] = defaultdict(list)
    for rank, program in enumerate(schedule):
        for kind, chunk, i in program:
            route = table[rank][kind][chunk]
            if route.source is not None and route.takes is not None:
                received[route.source, rank, PHASE[kind]].append(route.takes + i)
            if route.target is not None:
                sent[rank, route.target, PHASE[kind]].append(route.event + i)
    for channel in sorted(sent.keys() | received.keys()):
        if sent[channel] == received[channel]:
            continue
        source, target, phase = channel
        for k, pair in enumerate(zip_longest(sent[channel], received[channel])):
            if pair[0] != pair[1]:
                given, wanted = ("nothing" if event is None else event_name(event, schedule)[0] for event in pair)
                what = "activation" if phase == OUTPUT else "gradient"
                yield f"rank {source} to rank {target}: {what} {k} is sent as {given} and taken as {wanted}"
                break  # later messages of the channel are shifted by this one


def _stuck(schedule: Schedule, table: Routes, unreceived: int | None) -> Iterator[str]:
    """Let every rank run as far as it can; whoever does not reach its end waits for ever."""
    done = bytearray(3 * schedule.stages * schedule.micro_batches)
    position = [0] * schedule.ranks
    waiting: dict[int, list[int]] = {}  # by event
    under_way: Counter[Channel] = Counter()
    sending: dict[Channel, int] = {}  # channels that are full, and the rank that waits to send
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        program, own = schedule[rank], table[rank]
        at = position[rank]
        while at < len(program):
            kind, chunk, i = program[at]
            route = own[kind][chunk]
            missing = [need + i for need in route.needs if not done[need + i]]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            event = route.event + i
            done[event] = 1
            at += 1
            if event in waiting:
                ready += waiting.pop(event)
            if unreceived is None:
                continue
            if route.source is not None:
                taken = (route.source, rank, PHASE[kind])
                under_way[taken] -= 1
                if taken in sending:
                    ready.append(sending.pop(taken))
            if route.target is not None:
                given = (rank, route.target, PHASE[kind])
                under_way[given] += 1
                if under_way[given] > unreceived:
                    sending[given] = rank
                    break
        position[rank] = at
    for (_, target, _), rank in sorted(sending.items()):
        at = position[rank] - 1
        yield f"rank {rank} waits for ever after action {at} ({schedule[rank][at]}) to send it to rank {target}"
    for rank, event in sorted((rank, event) for event, ranks in waiting.items() for rank in ranks):
        at, (name, peer) = position[rank], event_name(event, schedule)
        yield f"rank {rank} waits for ever at action {at} ({schedule[rank][at]}) for {name} of rank {peer}"


def _overfull(schedule: Schedule, in_flight: int) -> Iterator[str]:
    for rank, program in enumerate(schedule):
        held = 0
        for at, action in enumerate(program):
            held += HELD[action.kind]
            if held > in_flight:
                yield f"rank {rank} holds {held} activations after action {at} ({action}), more than {in_flight}"
                break
