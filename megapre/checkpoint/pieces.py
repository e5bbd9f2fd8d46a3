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
        for offsets, found in _in_whole(place, row, column, values):
            yield Piece(offsets, found) if len(part) > 1 else Piece(offsets[:1], found.flatten())
        at += rows * columns


def _in_whole(place: Held, row: int, column: int, values: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """A rectangle of a rank's part, from (row, column) on, as rectangles of the whole."""
    local = 0
    for first, last in place.ranges:
        length = min(last, place.shape[place.dim]) - first  # without padding
        begin = row if place.dim == 0 else column
        start, stop = max(begin, local), min(begin + values.shape[place.dim], local + length)
        if start < stop:
            found = values.narrow(place.dim, start - begin, stop - start)
            there = first + start - local
            yield ((there, column) if place.dim == 0 else (row, there)), found
        local += last - first
