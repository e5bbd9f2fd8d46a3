"""What a rank hands over with each of its actions, to whom, and when its receives are posted. No tensor is touched.

When is a receive posted? Late ones leave the link idle. Early ones are worse: operations on one NCCL communicator run
in the order of issue, and a receive whose message is far away stands before everything behind it. Here each direction
between two ranks has a channel of its own, so that a receive can only stand before receives of the same peer, and
these are posted in the order in which the peer sends, which its row of the schedule tells. The channel's next message
is posted at most AHEAD actions before the one that takes it, and never a second one that the action at hand does not
need: the kernel of a receive then waits for its message alone, not for an earlier receive, so that with a single
hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) too nothing holds up the sends behind it.

Hence what `megapre.schedule.check` proves of first-in-first-out channels holds, though activations and gradients share
one: all that was sent before the message in want is received before it, and waits in memory for its action.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from megapre.schedule import Action, Schedule
from megapre.schedule.routes import routes

AHEAD = 2
"""Actions before which the receive of an action's input may be posted: of 1F1B, one forward and one backward."""


class Message(NamedTuple):
    """What goes to or comes from a peer, a rank of the pipeline: an event, as in megapre.schedule.routes."""

    peer: int
    event: int


class Step(NamedTuple):
    """An action with its hand-overs. Events that stay on the rank are handed over locally."""

    action: Action
    posts: tuple[Message, ...]
    """Receives to post before."""
    receives: Message | None
    """The input, where it comes from a peer."""
    takes: int | None
    """The input, where it was made on this rank."""
    sends: Message | None
    """The output, where it goes to a peer."""
    gives: int | None
    """The output, where it stays on this rank."""


def steps(schedule: Schedule, rank: int, evaluation: bool = False) -> Iterator[Step]:
    """The row of `rank` with all hand-overs; see the head of this file on when receives are posted."""
    table, last = routes(schedule)[rank], schedule.stages - 1
    program = [action for action in schedule[rank] if action.kind == "F" or not evaluation]
    order = {
        peer: [Message(peer, event) for _, event in messages(schedule, peer, rank, evaluation)]
        for peer in {way.source for ways in table.values() for way in ways if way.source is not None}
    }
    place = {way: k for channel in order.values() for k, way in enumerate(channel)}
    receives: list[Message | None] = []
    for kind, chunk, i in program:
        way = table[kind][chunk]
        receives.append(None if way.source is None or way.takes is None else Message(way.source, way.takes + i))
    posted: Counter[int] = Counter()
    needed: Counter[int] = Counter()
    for at, action in enumerate(program):
        posts: list[Message] = []
        for distance, message in enumerate(receives[at : at + 1 + AHEAD]):
            if message is None:
                continue
            peer, k = message.peer, place[message]
            if distance == 0:
                until = needed[peer] = max(needed[peer], k + 1)
            else:  # the next one, if all that are posted are needed by now
                until = min(k + 1, needed[peer] + 1)
            posts += order[peer][posted[peer] : until]
            posted[peer] = max(posted[peer], until)
        way, i = table[action.kind][action.chunk], action.micro_batch
        takes = None if way.takes is None or way.source is not None else way.takes + i
        sends = None if way.target is None else Message(way.target, way.event + i)
        stays = sends is None and action.kind != "W" and way.stage != (last if action.kind == "F" else 0)
        yield Step(action, tuple(posts), receives[at], takes, sends, way.event + i if stays else None)


def messages(schedule: Schedule, source: int, target: int, evaluation: bool = False) -> Iterator[tuple[Action, int]]:
    """What rank `source` sends to rank `target`, in order: the action that brings it about, and the event."""
    table = routes(schedule)[source]
    for action in schedule[source]:
        way = table[action.kind][action.chunk]
        if way.target == target and (action.kind == "F" or not evaluation):
            yield action, way.event + action.micro_batch
