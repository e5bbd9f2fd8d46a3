"""Tensors of which a process holds pieces: how they are written, and found again under any other cut.

A piece is a rectangle of the whole tensor. A checkpoint knows whole shapes and where each rectangle lies, and nothing
of the layout that wrote it; whoever loads asks for the rectangles it needs (planners.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from megapre.model.cut import Held


class Piece(NamedTuple):
    """A rectangle of a tensor: where it begins in the whole, and its elements."""

    offsets: tuple[int, ...]
    values: Tensor


class Pieces(NamedTuple):
    """What this process holds of a tensor of shape `shape`, and what of that it writes: of what several processes hold,
    one writes it."""

    shape: tuple[int, ...]
    held: tuple[Piece, ...]
    written: tuple[Piece, ...]


def whole(tensor: Tensor, written: bool = True) -> Pieces:
    """All of `tensor` is here."""
    pieces = (Piece((0,) * tensor.dim(), tensor),)
    return Pieces(tuple(tensor.shape), pieces, pieces if written else ())


def of_range(place: Held, part: Sequence[int], flat: Tensor, start: int) -> Iterator[Piece]:
    """The elements `flat` of a rank's part of a parameter, which begin at element `start` of that part, as pieces.

    `part` is the part's shape, of one or two dims; `place` says which rows or columns of the whole it has. Padding
    beyond the whole is left out.
    """
    width = part[1] if len(part) > 1 else 1
    at, end = start, start + flat.numel()
    while at < end:
        row, column = divmod(at, width)
        rows, columns = ((end - at) // width, width) if column == 0 and end - at >= width else (1, width - column)
        columns = min(columns, end - at)
        values = flat[at - start : at - start + rows * columns].view(rows, columns)
        for there, found in place.in_whole(values, column if place.dim else row):
            offsets = (row, there) if place.dim else (there, column)
            yield Piece(offsets, found) if len(part) > 1 else Piece(offsets[:1], found.flatten())
        at += rows * columns
