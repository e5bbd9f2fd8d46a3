"""What a rank's actions hold in memory, at every point of its program.

An activation is kept from its F to its B. Where the backward is split, I leaves what W needs: the inputs of products
and the gradients of their outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .actions import Action, Kind

HELD: Mapping[Kind, int] = {"F": 1, "B": -1, "I": 0, "W": -1}
"""What an action does to the number of activations on its rank."""


class Kept(NamedTuple):
    """Bytes of one micro-batch in one chunk: from F to B or I, from I to W, and only while F, or while B or I, runs."""

    whole: float
    for_weights: float
    in_forward: float = 0
    in_backward: float = 0


class Peak(NamedTuple):
    """The most bytes of a rank: what is kept between actions, and what the action `at` that point has besides."""

    kept: float
    besides: float
    at: Action | None

    @property
    def total(self) -> float:
        return self.kept + self.besides


def peak_in_flight(program: Sequence[Action]) -> int:
    """Most activations that a rank with these actions holds at any time, counted in chunks' worth."""
    held = peak = 0
    for action in program:
        held += HELD[action.kind]
        if held > peak:
            peak = held
    return peak


def peak_kept(program: Iterable[Action], chunks: Sequence[Kept]) -> Peak:
    """Of a rank with these actions, whose chunk c keeps chunks[c]. Of equal points the first."""
    change = {
        "F": [kept.whole for kept in chunks],
        "B": [-kept.whole for kept in chunks],
        "I": [kept.for_weights - kept.whole for kept in chunks],
        "W": [-kept.for_weights for kept in chunks],
    }
    besides = {
        "F": [kept.in_forward for kept in chunks],
        "B": [kept.in_backward for kept in chunks],
        "I": [kept.in_backward for kept in chunks],
        "W": [0.0 for _ in chunks],
    }
    held, most, peak = 0.0, 0.0, Peak(0, 0, None)
    for action in program:
        kind, chunk, _ = action
        after = held + change[kind][chunk]
        during = after if after > held else held  # an input goes when its action ends
        total = during + besides[kind][chunk]
        if total > most:
            most, peak = total, Peak(during, besides[kind][chunk], action)
        held = after
    return peak
