"""The sequential paired test: what its error rate promises, exactly where it can be counted, and on noisy clocks."""

import math
import random
from collections.abc import Callable

import pytest

from megapre.plan.paired import best, compare, wealth


def clock(rng: random.Random, gain: float, noise: float = 0.03, outliers: float = 0.05) -> Callable[[], float]:
    """Seconds of something that is faster than 1 ms by `gain`, with noise, and now and then three times as long."""
    return lambda: 1e-3 * (1 - gain) * (1 + rng.gauss(0, noise)) * (3 if rng.random() < outliers else 1)


def decided(seed: int, gains: dict[str, float], **options: float) -> str | None:
    rng = random.Random(seed)
    drift = [1.0]

    def drifting(gain: float) -> Callable[[], float]:
        of = clock(rng, gain)

        def once() -> float:
            drift[0] *= 1 + rng.gauss(0, 0.002)  # the machine warms up and cools down for all of them
            return of() * drift[0]

        return once

    verdicts = compare(drifting(0), {name: drifting(gain) for name, gain in gains.items()}, **options)  # type: ignore[arg-type]
    return best(verdicts)


@pytest.mark.parametrize("rounds", [1, 2, 7, 30])
def test_a_bet_on_fair_coins_is_worth_what_it_cost(rounds: int) -> None:
    mean = sum(math.comb(rounds, wins) / 2**rounds * wealth(wins, rounds) for wins in range(rounds + 1))
    assert mean == pytest.approx(1, rel=1e-12)


def test_wealth_after_a_round_is_the_mean_of_the_wealth_after_the_next() -> None:
    """A martingale at any time, so that one may stop when one likes (Ville)."""
    for rounds in range(1, 40):
        for wins in range(rounds + 1):
            after = (wealth(wins, rounds + 1) + wealth(wins + 1, rounds + 1)) / 2
            assert after == pytest.approx(wealth(wins, rounds), rel=1e-9)


def test_a_null_candidate_never_wins() -> None:
    wins = [decided(seed, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}) for seed in range(200)]
    assert wins == [None] * 200


def test_a_null_candidate_without_a_margin_wins_as_seldom_as_stated() -> None:
    """At the edge of what the test excludes: of 400 tries 1% may be wrong; 12 would be a chance of 1 in 1000."""
    wrong = sum(decided(seed, {"a": 0.0}, margin=0.0, error=0.01, rounds=100) is not None for seed in range(400))
    assert wrong < 12


def test_one_that_is_5_per_cent_faster_wins() -> None:
    wins = [decided(seed, {"a": 0.0, "better": 0.05, "c": 0.0, "d": -0.05}) for seed in range(60)]
    assert wins == ["better"] * 60


def test_one_that_is_faster_by_less_than_the_margin_does_not() -> None:
    assert [decided(seed, {"a": 0.01}) for seed in range(50)] == [None] * 50


def test_of_two_the_faster_wins_and_verdicts_tell_why() -> None:
    rng = random.Random(3)
    verdicts = compare(clock(rng, 0), {"good": clock(rng, 0.2), "better": clock(rng, 0.3), "worse": clock(rng, -0.2)})
    assert best(verdicts) == "better"
    assert [verdict.state for verdict in verdicts.values()] == ["faster", "faster", "not faster"]
    good, _, worse = verdicts.values()
    assert good.ratio == pytest.approx(0.8, abs=0.03) and good.wins > 0.8 * good.rounds
    assert worse.rounds < 30, "what is hopeless is not measured on"


def test_the_order_is_drawn_anew_each_round_and_alike_each_time() -> None:
    def order() -> str:
        said: list[str] = []

        def note(name: str) -> Callable[[], float]:
            return lambda: said.append(name) or 1.0  # type: ignore[func-returns-value]

        compare(note("0"), {"1": note("1"), "2": note("2")}, rounds=30)
        return "".join(said)

    rounds = [order()[at : at + 3] for at in range(0, 9, 3)]
    assert all(sorted(of) == ["0", "1", "2"] for of in rounds) and order() == order()
    assert len({order()[at] for at in range(0, 12, 3)}) > 1


def test_what_comes_first_is_slower_and_still_no_null_candidate_wins() -> None:
    """A position in the round that costs 10% would decide every round, were the order fixed."""
    for seed in range(100):
        rng = random.Random(seed)
        at = [0]

        def once(rng: random.Random = rng, at: list[int] = at) -> float:
            at[0] += 1
            return (1.1 if at[0] % 2 else 1.0) * (1 + rng.gauss(0, 0.001))

        assert best(compare(once, {"a": once}, rounds=100)) is None
