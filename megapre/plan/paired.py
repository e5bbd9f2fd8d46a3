"""Which of several candidates is faster than the default, measured in turns, with a stated chance of being wrong.

In each round the default and the candidates are measured one after the other in an order drawn anew, and a candidate
wins the round where its time is below (1 - margin) times the default's of the same round. Were it no faster than that,
it would win a round with a chance of at most 1/2, whatever the distribution of times, what drifts, and what one
measurement does to the next, so that

    wealth(wins of n) = sum_{j <= wins} C(n + 1, j) / ((n + 1) C(n, wins))

is a test martingale or less: what a bettor has after n fair coins who spreads 1 over all biases above 1/2, the
integral of 2^(n + 1) p^wins (1 - p)^(n - wins) over p from 1/2 to 1. The chance that it ever reaches 1 / e is at most e
(Ville 1939; Shafer and Vovk 2019), so one may look after every round and stop. With k candidates each needs k / e: the
chance that any of them is wrongly preferred is at most e (Bonferroni). Rounds lost are counted the same way, and a
candidate that they speak against by 20 to 1 is measured no further; that can only lower the chance of a mistake.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

MARGIN = 0.02
ERROR = 0.01
ROUNDS = 200
HOPELESS = 20.0


def wealth(wins: int, rounds: int) -> float:
    """What a bet on this many wins is worth; see above."""
    return sum(math.comb(rounds + 1, j) for j in range(wins + 1)) / ((rounds + 1) * math.comb(rounds, wins))


@dataclass(frozen=True)
class Verdict:
    """Of one candidate: rounds that it was measured and won, the median ratio of its time to the default's in them.

    `state` is "faster", "not faster" (the default wins ties), or "refused: why".
    """

    name: str
    rounds: int
    wins: int
    ratio: float
    state: str


def compare(
    default: Callable[[], float],
    candidates: Mapping[str, Callable[[], float]],
    *,
    margin: float = MARGIN,
    error: float = ERROR,
    rounds: int = ROUNDS,
) -> dict[str, Verdict]:
    """A verdict on each of `candidates`, which measure themselves once when they are called, in seconds.

    error: the chance that any of them is called faster and is not, by more than `margin`. Of several ranks all must be
    told the same times: then they decide alike.
    """
    needed = len(candidates) / error
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    decided: dict[str, str] = {}
    order = random.Random(0)  # the same on every rank
    for _ in range(rounds):
        alive = [name for name in candidates if name not in decided]
        if not alive:
            break
        turns = ["", *alive]
        order.shuffle(turns)
        times = {name: candidates[name]() if name else default() for name in turns}
        for name in alive:
            ratios[name].append(times[name] / times[""])
            count, wins = len(ratios[name]), _wins(ratios[name], margin)
            if wealth(wins, count) >= needed:
                decided[name] = "faster"
            elif wealth(count - wins, count) >= HOPELESS:
                decided[name] = "not faster"
    return {
        name: Verdict(name, len(found), _wins(found, margin), median(found), decided.get(name, "not faster"))
        for name, found in ratios.items()
    }


def best(verdicts: Mapping[str, Verdict]) -> str | None:
    """The faster one with the least median ratio; None where none is faster, and the default stays."""
    faster = [verdict for verdict in verdicts.values() if verdict.state == "faster"]
    return min(faster, key=lambda verdict: verdict.ratio).name if faster else None


def _wins(ratios: list[float], margin: float) -> int:
    return sum(ratio < 1 - margin for ratio in ratios)
