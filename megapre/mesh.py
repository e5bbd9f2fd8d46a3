"""The grid of ranks: one tensor, sliced.

World = arange(world).reshape(pp, dp, cp, tp), so tp varies fastest (as in Megatron-LM): the ranks of one
tensor-parallel group are neighbours on NVLink, and pipeline stages are far apart. Every process group is a slice of
that grid. A Mesh is a value: it needs no process group, so layouts for 16,384 GPUs are tested on a laptop.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from .config import Layout
from .errors import UserError

AXES = ("pp", "dp", "cp", "tp")


class MeshError(UserError):
    """A world that cannot be cut as asked, or a rank or an axis that is not there."""


class Coords(NamedTuple):
    """Where a rank stands on each axis."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """`world` ranks on the axes pp, dp, cp, tp; dp is what the other three leave over.

    Raises MeshError where tp * pp * cp does not divide world.
    """

    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("world", "tp", "pp", "cp"):
            if getattr(self, name) < 1:
                raise MeshError(f"mesh: {name} = {getattr(self, name)} must be at least 1")
        replica = self.tp * self.pp * self.cp
        if self.world % replica:
            below, above = self.world // replica * replica, -(-self.world // replica) * replica
            nearest = f"{below} or {above}" if below else f"{above}"
            here = f"{self.world} rank{'s' if self.world > 1 else ''}"
            raise MeshError(
                f"mesh: a world of {here} cannot be cut into replicas of tp*pp*cp = {self.tp}*{self.pp}*{self.cp} = "
                f"{replica} ranks ({self.world} % {replica} = {self.world % replica}); nearest: world {nearest}"
            )

    @classmethod
    def of(cls, layout: Layout, world: int) -> Self:
        """The mesh of `layout` on `world` ranks. Raises MeshError where they do not fit, dp included."""
        mesh = cls(world, tp=layout.tp, pp=layout.pp, cp=layout.cp)
        if layout.dp not in (0, mesh.dp):
            raise MeshError(
                f"layout: tp*pp*cp*dp = {layout.tp}*{layout.pp}*{layout.cp}*{layout.dp} = "
                f"{layout.model_parallel * layout.dp} ranks, but there are {world}; nearest: "
                f"{layout.model_parallel * layout.dp} ranks, dp {mesh.dp}, or dp 0 (as many as there are)"
            )
        return mesh

    @property
    def dp(self) -> int:
        """Replicas of the model."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Length of each of AXES."""
        return self.pp, self.dp, self.cp, self.tp

    @cached_property
    def grid(self) -> npt.NDArray[np.int64]:
        """Ranks as a read-only [pp, dp, cp, tp] array."""
        grid = np.arange(self.world, dtype=np.int64).reshape(self.shape)
        grid.flags.writeable = False
        return grid

    def coords(self, rank: int) -> Coords:
        """Where `rank` stands. Raises MeshError for a rank outside the world."""
        if not 0 <= rank < self.world:
            raise MeshError(f"mesh: rank {rank} is not in a world of {self.world} (0 to {self.world - 1})")
        return Coords(*(int(index) for index in np.unravel_index(rank, self.shape)))

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups along `axes` in one fixed order, each in rank order: with "tp", the tensor-parallel groups; with
        "dp", "cp", the groups that average gradients. Every rank is in exactly one.
        """
        dims = self._dims(axes)
        last = np.moveaxis(self.grid, dims, range(-len(dims), 0))
        flat = last.reshape(-1, int(np.prod([self.shape[dim] for dim in dims])))
        return [tuple(int(rank) for rank in group) for group in flat]

    def group_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group along `axes` that `rank` is in."""
        dims, coords = self._dims(axes), self.coords(rank)
        index = tuple(slice(None) if dim in dims else coords[dim] for dim in range(len(AXES)))
        return tuple(int(member) for member in self.grid[index].reshape(-1))

    def _dims(self, axes: tuple[str, ...]) -> list[int]:
        wrong = [axis for axis in axes if axis not in AXES]
        if wrong or not axes or len(set(axes)) < len(axes):
            raise MeshError(f"mesh: axes {axes} are not distinct ones of {', '.join(AXES)}")
        return sorted(AXES.index(axis) for axis in axes)

    def __str__(self) -> str:
        """A picture: a row for each pipeline stage, a column for each replica; long rows and columns are cut short."""
        sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.shape, strict=True))
        if self.world == 1:
            return "1 rank"
        rows, columns = _ends(self.pp, 4), _ends(self.dp, 3)
        table = [["", *("..." if dp is None else f"dp {dp}" for dp in columns)]]
        for pp in rows:
            table.append(["..." if pp is None else f"pp {pp}", *(self._cell(pp, dp) for dp in columns)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["   ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in table]
        title = f"{self.world} ranks = {sizes}"
        return "\n".join([title, *(line.rstrip() for line in lines)])

    def _cell(self, pp: int | None, dp: int | None) -> str:
        """Ranks of one replica's stage: neighbours, so a range when wide; '|' stands between context slices."""
        if pp is None or dp is None:
            return "..."
        block = self.grid[pp, dp]
        digits = len(str(self.world - 1))
        if block.size * (digits + 1) + 2 * self.cp <= 20:
            return " | ".join(" ".join(str(rank) for rank in row) for row in block)
        return f"{block[0, 0]}..{block[-1, -1]}"


def _ends(length: int, shown: int) -> list[int | None]:
    """0..length-1, or the first `shown`, None for what is left out, and the last."""
    if length <= shown + 1:
        return list(range(length))
    return [*itertools.islice(range(length), shown), None, length - 1]


def spans(ranks: Sequence[int]) -> str:
    """Ranks in rising order, in words: "rank 3", "ranks 0-2, 7"."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in found]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts)}"
