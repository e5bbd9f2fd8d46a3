"""Which dataset gives sample i: weighted and exhaustive blends, and blends that change as training goes on.

Sample i comes from the dataset that lags furthest behind its share: argmax_d (w_d * max(i, 1) - count_d), the first
maximum wins (Megatron-LM, core/datasets/helpers.cpp). The rule looks back only, so a longer blend begins as a shorter.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError
from .host import host

# More samples are asked of each dataset than its share, as the greedy rule may lead by a few over the share.
SURPLUS = 0.005
MOST_DATASETS = 2**15 - 1


class BlendIndex(NamedTuple):
    """For each sample of the blend: the dataset it comes from (int16), and which of its samples it is (int64)."""

    dataset: NDArray[np.int16]
    sample: NDArray[np.int64]


def normalize(weights: ArrayLike) -> NDArray[np.float64]:
    """Weights in float64 that add up to 1. Raises DataError unless all are finite, none negative and one positive."""
    given = np.asarray(weights, np.float64)
    if given.ndim != 1 or not 1 <= len(given) <= MOST_DATASETS:
        raise DataError(f"a blend of {given.size} datasets; 1 to {MOST_DATASETS} can be blended")
    if not np.isfinite(given).all() or (given < 0).any() or given.sum() == 0:
        raise DataError(f"weights {given.tolist()} of a blend; they must be finite, not negative, and not all zero")
    return given / given.sum()


def build_blend(weights: ArrayLike, size: int) -> BlendIndex:
    """The first `size` samples of a blend in which dataset d has the share weights[d] / sum(weights)."""
    return _build(normalize(weights), size, None)


def build_exhaustive_blend(sizes: Sequence[int]) -> BlendIndex:
    """A blend that gives each of sizes[d] samples of every dataset d once, evenly mixed; sum(sizes) samples."""
    limits = np.asarray(sizes, np.int64)
    normalize(limits)  # for its checks
    return _build(limits / np.float64(limits.sum()), int(limits.sum()), limits)


def requests(weights: ArrayLike, size: int) -> list[int]:
    """How many samples to ask of each dataset for a blend of `size`: its share, rounded up, and the surplus."""
    return [math.ceil(math.ceil(size * w) * (1 + SURPLUS)) for w in normalize(weights).tolist()]


def _build(weights: NDArray[np.float64], size: int, limits: NDArray[np.int64] | None) -> BlendIndex:
    native = host()
    if native is not None:
        return BlendIndex(*native.build_blend(weights, size, limits))
    return _build_numpy(weights, size, limits)


def _build_numpy(weights: NDArray[np.float64], size: int, limits: NDArray[np.int64] | None) -> BlendIndex:
    index = BlendIndex(np.empty(size, np.int16), np.empty(size, np.int64))
    given = np.zeros(len(weights))
    full = np.full(len(weights), np.inf) if limits is None else limits.astype(np.float64)
    gone = np.where(given == full, np.inf, 0.0)  # infinity for a dataset that gave all: it is never behind
    behind = np.empty(len(weights))
    for i in range(size):
        np.multiply(weights, max(i, 1), out=behind)
        np.subtract(behind, given, out=behind)
        np.subtract(behind, gone, out=behind)
        chosen = int(behind.argmax())
        index.dataset[i] = chosen
        index.sample[i] = given[chosen]
        given[chosen] += 1
        if given[chosen] == full[chosen]:
            gone[chosen] = np.inf
    return index
