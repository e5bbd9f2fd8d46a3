"""Blends against the rule in plain Python, and what one expects of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre.data import DataError, build_blend, build_exhaustive_blend
from megapre.data.blend import _build, _build_numpy, normalize, requests

WEIGHTS = st.lists(st.floats(0.0, 100.0), min_size=1, max_size=6).filter(any)
SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)


def greedy(weights: list[float], size: int, limits: list[int] | None) -> tuple[list[int], list[int]]:
    """The dataset that lags furthest behind its share, the first of equals, until it has given its limit."""
    given_, dataset, sample = [0] * len(weights), [], []
    for i in range(size):
        left = [d for d in range(len(weights)) if limits is None or given_[d] < limits[d]]
        chosen = max(left, key=lambda d: weights[d] * max(i, 1) - given_[d])  # max keeps the first
        dataset.append(chosen)
        sample.append(given_[chosen])
        given_[chosen] += 1
    return dataset, sample


@given(WEIGHTS, st.integers(0, 200))
def test_weighted(weights: list[float], size: int) -> None:
    shares = normalize(weights)
    wanted = greedy(shares.tolist(), size, None)
    for index in (build_blend(weights, size), _build_numpy(shares, size, None)):
        assert (index.dataset.tolist(), index.sample.tolist()) == wanted
        assert (index.dataset.dtype, index.sample.dtype) == (np.int16, np.int64)


@given(SIZES)
def test_exhaustive(sizes: list[int]) -> None:
    limits = np.array(sizes)
    shares = limits / np.float64(limits.sum())
    wanted = greedy(shares.tolist(), sum(sizes), sizes)
    for index in (build_exhaustive_blend(sizes), _build_numpy(shares, sum(sizes), limits)):
        assert (index.dataset.tolist(), index.sample.tolist()) == wanted
    for d, size in enumerate(sizes):  # every sample of every dataset, once
        assert index.sample[index.dataset == d].tolist() == list(range(size))


def test_native_and_numpy_round_alike_over_a_long_blend() -> None:
    """Thirds and sevenths are ties in real numbers; a fused multiply-add breaks them another way."""
    shares = normalize([1 / 3, 1 / 7, 2 / 7, 5 / 21])
    native, plain = _build(shares, 20_000, None), _build_numpy(shares, 20_000, None)
    assert np.array_equal(native.dataset, plain.dataset)
    assert np.array_equal(native.sample, plain.sample)


@given(WEIGHTS, st.integers(1, 300), st.integers(0, 50))
def test_a_longer_blend_begins_as_a_shorter(weights: list[float], size: int, more: int) -> None:
    short, long = build_blend(weights, size), build_blend(weights, size + more)
    assert np.array_equal(short.dataset, long.dataset[:size])
    assert np.array_equal(short.sample, long.sample[:size])


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5), st.integers(200, 2000))
def test_shares_are_kept_and_requests_suffice(weights: list[float], size: int) -> None:
    index = build_blend(weights, size)
    counts = np.bincount(index.dataset, minlength=len(weights))
    assert (np.abs(counts - normalize(weights) * size) <= len(weights)).all()
    assert (counts <= np.array(requests(weights, size)) + 1).all()


def test_requests_are_rounded_up_twice() -> None:
    assert requests([1, 3], 1000) == [252, 754]  # ceil(250 * 1.005), ceil(750 * 1.005)
    assert requests([1, 2], 10) == [5, 8]  # ceil(4 * 1.005), ceil(7 * 1.005)


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 2.0], [float("nan")], [float("inf")], [[1.0]], [1.0] * 40_000])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(DataError, match=r"weights|datasets"):
        build_blend(weights, 3)


def test_an_exhaustive_blend_of_nothing() -> None:
    with pytest.raises(DataError):
        build_exhaustive_blend([0, 0])
