"""`megapre tune comm`: who wins, who is refused, and what is left out; the statistics are those of tests/plan."""

from collections.abc import Callable

import pytest
from fake_link import FakeTrial, FakeWatch

from megapre.config import load
from megapre.observe.comm_ranks import BenchCommError
from megapre.observe.tune_comm import MOST_BUCKETS, Comparison, Request, bucket_sizes, race, run
from megapre.parallel.comm import CommError
from megapre.plan.flat import BUCKET_ELEMENTS


def raced(seed: int = 0, **candidates: FakeTrial | Callable[[], FakeTrial]) -> Comparison:
    builders = {
        name: (lambda trial=trial: trial) if isinstance(trial, FakeTrial) else trial
        for name, trial in candidates.items()
    }
    return race("what", "as it is", lambda: FakeTrial(0.05), builders, FakeWatch(seed), Request(budget=1e9))  # type: ignore[arg-type]


def test_a_null_candidate_never_wins_over_200_seeds() -> None:
    assert [raced(seed, a=FakeTrial(0.05), b=FakeTrial(0.05)).winner for seed in range(200)] == [None] * 200


def test_one_that_is_5_per_cent_faster_wins() -> None:
    assert [raced(seed, a=FakeTrial(0.05), b=FakeTrial(0.0475)).winner for seed in range(20)] == ["b"] * 20


def test_a_wrong_checksum_is_refused_however_fast() -> None:
    found = raced(wrong=FakeTrial(0.01, "left"), good=FakeTrial(0.04))
    assert found.winner == "good"
    assert found.verdicts["wrong"].state.startswith("refused: its checksum left is not the default's right")
    assert list(found.verdicts) == ["wrong", "good"] and found.verdicts["wrong"].rounds == 0
    assert found.verdicts["good"].ratio == pytest.approx(0.8, abs=0.06)
    assert found.said() == f"chosen: good, in {found.verdicts['good'].ratio:.3f} of the default's time"


def test_what_cannot_be_made_is_refused_with_its_reason() -> None:
    def fails() -> FakeTrial:
        raise CommError("NCCL in torch 2.13 has no option 'max_ctas'\nmore")

    found = raced(a=fails)
    assert found.winner is None and found.said() == "the default stays"
    assert found.verdicts["a"].state == "refused: NCCL in torch 2.13 has no option 'max_ctas'"


class OtherRankRefuses(FakeWatch):
    def most(self, number: float) -> float:
        return 1.0


def test_what_another_rank_refuses_is_refused_here() -> None:
    found = race("w", "d", lambda: FakeTrial(1), {"a": lambda: FakeTrial(0.1)}, OtherRankRefuses(), Request())
    assert found.winner is None and found.verdicts["a"].state == "refused: another rank refused it"


def test_the_budget_limits_the_rounds_and_never_below_one() -> None:
    def rounds(budget: float) -> int:
        request = Request(budget=budget)
        found = race("w", "d", lambda: FakeTrial(1), {"a": lambda: FakeTrial(1.0)}, FakeWatch(), request)
        return found.verdicts["a"].rounds

    assert rounds(0.1) == 1 and 2 <= rounds(8.0) <= 4


def test_bucket_sizes_cut_the_gradients_in_ways_that_differ() -> None:
    for elements in (9000, 10**6, 3 * 10**8, 10**10):
        sizes = bucket_sizes(elements, BUCKET_ELEMENTS)
        counts = [-(-elements // size) for size in sizes]
        assert sizes and len(set(counts)) == len(counts) and -(-elements // BUCKET_ELEMENTS) not in counts
        assert all(2 <= count <= MOST_BUCKETS for count in counts)
    assert bucket_sizes(1000, BUCKET_ELEMENTS) == []


def test_a_part_that_there_is_not_is_refused() -> None:
    with pytest.raises(BenchCommError, match="no colours; there are communicators, buckets, products"):
        run(load("debug"), Request(only=("colours",)))
