"""The words that schedules are written in.

A model is cut into ranks * chunks stages; rank r holds stages r, r + ranks, r + 2*ranks, ... as its chunks 0, 1, 2, ...
"""

from typing import Literal, NamedTuple, TypeAlias

from ..errors import UserError

Kind: TypeAlias = Literal["F", "B"]


class ScheduleError(UserError):
    """A schedule that does not exist or cannot be built for these sizes."""


class Action(NamedTuple):
    """Forward ("F") or backward ("B") of one micro-batch through one chunk of the rank. Prints as F3.1."""

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}.{self.chunk}"


Schedule: TypeAlias = tuple[tuple[Action, ...], ...]
"""For each rank its actions, in order."""


def stage_of(rank: int, chunk: int, ranks: int) -> int:
    """The stage, counted from the model's input, that `rank` holds as `chunk`."""
    return chunk * ranks + rank
