"""The index arrays against the walk as Megatron writes it down, in plain Python; and their size limits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre.data import DataError, build_gpt_index, split_ranges
from megapre.data.gpt_index import _sample_count, _sample_index_numpy, build_sample_index
from megapre.data.host import host


def walk(lengths: list[int], document: list[int], s: int, x: int, keep: bool) -> list[tuple[int, int]]:
    """The sample index, token by token as core/datasets/helpers.cpp says it."""
    total = sum(lengths[d] for d in document)
    count = math.ceil((total - x) / s) if keep else (total - x) // s
    rows, place, offset = [(0, 0)], 0, 0
    while len(rows) <= count:
        remaining = s + x
        while remaining:
            length = lengths[document[place]] - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - x
                remaining = 0
            elif place == len(document) - 1:
                offset = lengths[document[place]] - x
                break
            else:
                place, offset = place + 1, 0
        rows.append((place, offset))
    return rows


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=20)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 1), st.booleans(), st.integers(0, 5))
def test_sample_index(lengths: list[int], s: int, x: int, keep: bool, seed: int) -> None:
    document = np.random.RandomState(seed).permutation(np.arange(len(lengths), dtype=np.int32))
    wanted = walk(lengths, document.tolist(), s, x, keep)
    built = [
        build(np.array(lengths, length), document, len(wanted) - 1, s, x, np.dtype(row))
        for build in (build_sample_index, _sample_index_numpy)
        for length in (np.int32, np.int64)
        for row in (np.int32, np.int64)
    ]
    for sample in built:
        assert list(map(tuple, sample.tolist())) == wanted
    assert {sample.dtype.itemsize for sample in built} == {4, 8}


@given(LENGTHS, st.integers(1, 9), st.one_of(st.none(), st.integers(0, 60)), st.booleans(), st.booleans())
def test_whole_index(lengths: list[int], s: int, asked: int | None, extra: bool, keep: bool) -> None:
    documents = np.arange(len(lengths))
    index = build_gpt_index(lengths, documents, asked, s, 7, extra, keep)
    x, tokens = int(extra), sum(lengths)
    epochs = len(index.document) // len(lengths)
    # The least number of epochs, every document once in each.
    wanted = 0 if asked is None else asked * s + x
    assert epochs * tokens >= wanted
    assert epochs == 1 or (epochs - 1) * tokens < wanted
    assert np.array_equal(np.bincount(index.document, minlength=len(lengths)), np.full(len(lengths), epochs))
    assert list(map(tuple, index.sample.tolist())) == walk(lengths, index.document.tolist(), s, x, keep)
    assert sorted(index.shuffle.tolist()) == list(range(len(index.sample) - 1))
    assert asked is None or index.samples >= asked
    # The last epoch stands apart when little of it is wanted: then all before it is whole epochs.
    whole = ((epochs - 1) * tokens - x) // s
    if asked is not None and epochs > 1 and asked - whole < int(0.80 * ((tokens - x) // s)):
        last = index.document[-len(lengths) :]
        assert np.array_equal(np.sort(last), documents)
        assert sorted(index.shuffle[:whole].tolist()) == list(range(whole))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any), st.integers(1, 5))
def test_sequences_without_tokens_are_walked_over(lengths: list[int], s: int) -> None:
    index = build_gpt_index(lengths, np.arange(len(lengths)), None, s, 3)
    assert list(map(tuple, index.sample.tolist())) == walk(lengths, index.document.tolist(), s, 1, False)


def test_seeds_differ_and_repeat() -> None:
    arguments = (np.full(100, 7), np.arange(100), None, 5)
    one, two, again = (build_gpt_index(*arguments, seed) for seed in (1, 2, 1))
    assert not np.array_equal(one.document, two.document)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))


def check_positions(lengths: np.ndarray, index: object, s: int) -> None:
    """Sample k starts at token k * s of the line, in exact arithmetic."""
    document, sample = index.document, index.sample  # type: ignore[attr-defined]
    starts = np.concatenate([[0], np.cumsum(lengths[document], dtype=np.int64)])
    place, offset = sample[:, 0].astype(np.int64), sample[:, 1].astype(np.int64)
    assert np.array_equal(starts[place] + offset, np.arange(len(sample)) * s)
    assert (offset >= 0).all()
    assert (offset < lengths[document[place]]).all()


@pytest.mark.parametrize(("asked", "epochs"), [(None, 1), (3_000_000, 3)])
def test_five_billion_tokens(native: bool, asked: int | None, epochs: int) -> None:
    """Two documents as long as the format allows and 200,000 of usual lengths: sums pass 2^31 and 2^32."""
    lengths = np.random.default_rng(0).integers(1, 7_000, 200_002).astype(np.int32)
    lengths[[5, 70_000]] = 2**31 - 1
    s = 4096
    index = build_gpt_index(lengths, np.arange(len(lengths)), asked, s, 1234)
    tokens = int(lengths.sum(dtype=np.int64))
    assert tokens > 4.9e9
    assert len(index.document) == epochs * len(lengths)
    assert index.samples == (epochs * tokens - 1) // s
    assert index.sample.dtype == np.int32
    check_positions(lengths, index, s)


def test_a_document_beyond_int32_widens_the_rows(native: bool) -> None:
    lengths = np.array([10, 3 * 2**31, 10, 2**33], np.int64)
    index = build_gpt_index(lengths, np.arange(4), None, 2**16, 5)
    assert index.sample.dtype == np.int64
    assert int(index.sample.max()) > 2**32
    check_positions(lengths, index, 2**16)


def test_partial_samples_are_counted_in_float32_as_megatron_does() -> None:
    assert [_sample_count(tokens, 4, True) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert _sample_count(2**24 + 3, 1, True) == 2**24 + 4  # the nearest float32; the ceiling would be 2^24 + 3
    assert _sample_count(2**24 + 3, 1, False) == 2**24 + 3


def test_nothing_to_index() -> None:
    for lengths, documents in (([], []), ([3, 4], []), ([0, 0], [0, 1])):
        with pytest.raises(DataError, match="without a token; at least 9 are needed"):
            build_gpt_index(np.array(lengths, np.int32), np.array(documents, np.int32), None, 8, 0)
    with pytest.raises(ValueError, match="seq_length 0"):
        build_gpt_index([1], [0], None, 0, 0)


def test_too_short_for_a_sample_is_an_index_of_none() -> None:
    assert build_gpt_index([3, 4], [0, 1], None, 8, 0).samples == 0


@pytest.mark.skipif(host() is None, reason="megapre._host is not built")
def test_the_native_builder_checks_what_it_is_given() -> None:
    native = host()
    assert native is not None
    good = (np.ones(3, np.int32), np.arange(3, dtype=np.int32), np.zeros((4, 2), np.int32), 1, 0)
    native.build_sample_index(*good)
    for place, bad in [
        (0, np.ones(3, np.float64)),
        (0, np.ones(6, np.int32)[::2]),
        (1, np.array([0, 1, 3], np.int32)),
        (1, np.array([-1], np.int32)),
        (1, np.empty(0, np.int32)),
        (2, np.zeros((4, 3), np.int32)),
        (2, np.zeros((4, 4), np.int32)[:, ::2]),
        (3, 0),
    ]:
        arguments = list(good)
        arguments[place] = bad
        with pytest.raises((ValueError, IndexError)):
            native.build_sample_index(*arguments)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any), st.integers(0, 5000))
def test_splits_are_neighbours_and_cover_everything(weights: list[int], documents: int) -> None:
    ranges = split_ranges(",".join(map(str, weights)), documents)
    edges = [edge for name in ("train", "valid", "test") for edge in ranges[name]]
    assert edges[0] == 0
    assert edges[-1] == documents
    assert edges[1] == edges[2]
    assert edges[3] == edges[4]
    assert edges == sorted(edges)
    for name, weight in zip(ranges, weights, strict=False):
        low, high = ranges[name]
        assert abs((high - low) - documents * weight / sum(weights)) <= 1


def test_splits_read_numbers_as_megatron_does() -> None:
    assert split_ranges("0.9 / 0.1", 10) == {"train": (0, 9), "valid": (9, 10), "test": (10, 10)}
    assert split_ranges("1,1", 5) == {"train": (0, 2), "valid": (2, 5), "test": (5, 5)}  # 2.5 rounds to the even 2


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "1.2.3"])
def test_bad_splits(split: str) -> None:
    with pytest.raises(DataError, match="969,30,1"):
        split_ranges(split, 10)
