"""The words that schedules are written in.

A model is cut into stages, counted from its input; each rank holds `chunks` of them. Where they lie is the placement:

    loop   rank r holds stages r, r + p, r + 2p, ... as its chunks 0, 1, 2, ... (Narayanan et al. 2021)
    v      even chunks go down the ranks, odd ones come back up: with two, rank r holds r and 2p - 1 - r, so that
           rank 0 has both ends of the model and the last rank the turn (Qi et al. 2024)

A backward is one action (B), or two: the gradient of the input (I), which the stage before waits for, and that of the
weights (W), which nobody waits for and which can fill what would be idle time (Qi et al. 2023).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from ..errors import UserError

Kind: TypeAlias = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")
Placement: TypeAlias = Literal["loop", "v"]


class ScheduleError(UserError):
    """A schedule that does not exist or cannot be built or read."""


class Action(NamedTuple):
    """One micro-batch through one chunk of the rank: forward "F", whole backward "B", or its halves "I" and "W".

    Prints as F3.1: forward of micro-batch 3 through chunk 1.
    """

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}.{self.chunk}"


Programs: TypeAlias = tuple[tuple[Action, ...], ...]
"""For each rank its actions, in order."""


@dataclass(frozen=True)
class Schedule:
    """What each rank does, in order. A sequence over ranks: schedule[r] are the actions of rank r."""

    name: str
    chunks: int
    micro_batches: int
    programs: Programs
    placement: Placement = "loop"

    @property
    def ranks(self) -> int:
        return len(self.programs)

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def stage_of(self, rank: int, chunk: int) -> int:
        """The stage, counted from the model's input, that `rank` holds as `chunk`."""
        return stage_of(rank, chunk, self.ranks, self.placement)

    def holder(self, stage: int) -> tuple[int, int]:
        """The rank that holds `stage`, and as which of its chunks."""
        return holder(stage, self.ranks, self.placement)

    def __len__(self) -> int:
        return len(self.programs)

    def __getitem__(self, rank: int) -> tuple[Action, ...]:
        return self.programs[rank]

    def __iter__(self) -> Iterator[tuple[Action, ...]]:
        return iter(self.programs)


def stage_of(rank: int, chunk: int, ranks: int, placement: Placement = "loop") -> int:
    """The stage, counted from the model's input, that `rank` of `ranks` holds as `chunk`."""
    back = placement == "v" and chunk % 2 == 1
    return chunk * ranks + (ranks - 1 - rank if back else rank)


def holder(stage: int, ranks: int, placement: Placement = "loop") -> tuple[int, int]:
    """The rank that holds `stage`, and as which of its chunks: the inverse of stage_of."""
    chunk, place = divmod(stage, ranks)
    back = placement == "v" and chunk % 2 == 1
    return (ranks - 1 - place if back else place), chunk
