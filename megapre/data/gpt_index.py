"""Which tokens make up sample i: the index arrays of Megatron's GPTDataset, element for element.

Documents are shuffled and laid end to end, E epochs of them; that line is cut into samples of s tokens (and x more,
which the next sample shares, so that labels can be the tokens shifted by one); the samples are shuffled.

    document  int32 [E * documents]   the line: which sequence comes at each place
    sample    int32 [K + 1, 2]        (place in `document`, token offset in it) where each sample starts
    shuffle   uint32 [K]              sample i of the run is sample shuffle[i] of the line

Source of the rules: Megatron-LM, core/datasets/gpt_dataset.py and helpers.cpp.
"""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError
from .host import host

# The last epoch is shuffled apart when less than this share of it is wanted, so that the epochs before stay whole.
SEPARATE_BELOW = 0.80
LARGEST_INT32 = 2**31 - 1


class GPTIndex(NamedTuple):
    """The three arrays; see the module's table."""

    document: NDArray[np.int32]
    sample: NDArray  # int32, or int64 where a place or an offset needs it
    shuffle: NDArray  # uint32, or int64 from 2^32 - 2 samples on

    @property
    def samples(self) -> int:
        """K, the number of samples."""
        return len(self.shuffle)


def split_ranges(split: str, documents: int) -> dict[str, tuple[int, int]]:
    """The half-open range of documents of "train", "valid" and "test".

    `split` is up to three weights, "969,30,1". Raises DataError where they are none, more than three, or all zero.
    """
    try:
        weights = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or sum(weights) == 0:
        raise DataError(f'split "{split}" is not one to three weights of train, valid and test, such as "969,30,1"')
    weights += [0.0] * (3 - len(weights))
    # Megatron's arithmetic, rounding and order of additions included: other sums differ in the last document.
    shares = (np.array(weights) / np.sum(weights)).tolist()
    ranges, low = {}, 0.0
    for name, share in zip(("train", "valid", "test"), shares, strict=True):
        high = low + share
        ranges[name] = (round(low * float(documents)), round(high * float(documents)))
        low = high
    return ranges


def build_gpt_index(
    lengths: ArrayLike,
    documents: ArrayLike,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    add_extra_token: bool = True,
    keep_partial: bool = False,
) -> GPTIndex:
    """The index arrays of one dataset and split.

    Args: `lengths` tokens of every sequence of the dataset; `documents` the sequences of the split, as indices into
    `lengths`; `num_samples` how many samples at least, None for one epoch; `seq_length` s; `seed` of the two shuffles;
    `add_extra_token` x = 1, else 0; `keep_partial` keep the last sample, shorter than s, too.
    There may be fewer than `num_samples` by none, and more by the rest of the last epoch. Raises DataError where the
    documents hold no token.
    """
    lengths, documents = np.asarray(lengths), np.asarray(documents)
    if seq_length < 1:
        raise ValueError(f"seq_length {seq_length} must be at least 1")
    if len(documents) > LARGEST_INT32 or (len(documents) and int(documents.max()) > LARGEST_INT32):
        raise DataError(f"{len(documents):,} documents; the index counts to {LARGEST_INT32:,}")
    extra = int(add_extra_token)
    tokens = _tokens(lengths, documents)
    if tokens == 0:
        raise DataError(f"{len(documents):,} documents without a token; at least {seq_length + extra:,} are needed")
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + extra) // tokens))
    whole = ((epochs - 1) * tokens - extra) // seq_length  # samples of all epochs but the last
    separate = False
    if num_samples is not None and epochs > 1:
        separate = num_samples - whole < int(SEPARATE_BELOW * ((tokens - extra) // seq_length))

    # One stream of random numbers for all shuffles, in this order.
    random = np.random.RandomState(seed)
    document = _document_index(documents.astype(np.int32, copy=False), epochs, separate, random)
    longest = int(lengths.max())
    count = _sample_count(epochs * tokens - extra, seq_length, keep_partial)
    dtype = np.dtype(np.int64 if max(len(document), longest) > LARGEST_INT32 else np.int32)
    sample = build_sample_index(lengths, document, count, seq_length, extra, dtype)
    shuffle = _shuffle_index(whole if separate else count, count, random)
    return GPTIndex(document, sample, shuffle)


def _tokens(lengths: NDArray, documents: NDArray) -> int:
    """Tokens of one epoch; a contiguous split, the usual one, is summed without a copy."""
    if len(documents) == 0:
        return 0
    first, last = int(documents[0]), int(documents[-1])
    if last - first + 1 == len(documents) and bool((documents[1:] > documents[:-1]).all()):
        return int(lengths[first : last + 1].sum(dtype=np.int64))
    return int(lengths[documents].sum(dtype=np.int64))


def _document_index(
    documents: NDArray[np.int32], epochs: int, separate: bool, random: np.random.RandomState
) -> NDArray[np.int32]:
    index = np.tile(documents, epochs)
    last = len(documents) * (epochs - 1) if separate else len(index)
    random.shuffle(index[:last])
    if separate:
        random.shuffle(index[last:])
    return index


def _sample_count(tokens: int, seq_length: int, keep_partial: bool) -> int:
    if not keep_partial:
        return tokens // seq_length
    # Megatron divides in C++ floats; beyond 2^24 tokens that is not the exact ceiling, but it is what its files hold.
    return int(np.ceil(np.float32(tokens) / np.float32(seq_length)))


def _shuffle_index(first: int, count: int, random: np.random.RandomState) -> NDArray:
    index = np.arange(count, dtype=np.int64 if count >= 2**32 - 2 else np.uint32)
    random.shuffle(index[:first])
    if first < count:
        random.shuffle(index[first:])
    return index


def build_sample_index(
    lengths: NDArray, document: NDArray[np.int32], count: int, seq_length: int, extra: int, dtype: np.dtype
) -> NDArray:
    """Where each of `count` samples starts, and where the last ends: [count + 1, 2] of (place in document, offset).

    The start of sample k is found by walking k * s + x tokens and stepping back x; so it lies in the sequence that
    holds token k * s + x - 1 of the line, and a sample that ends with its sequence leaves the row on that sequence.
    Sample 0 starts at (0, 0). Where tokens run out, rows stay at (last place, length - x). In C++ where it is built:
    one pass.
    """
    native = host()
    if native is not None:
        # Those of a mapped .idx start at byte 34, where no int32 is aligned.
        lengths = np.require(lengths, np.int64 if lengths.dtype.itemsize > 4 else np.int32, ["C", "A"])
        sample = np.empty((count + 1, 2), dtype)
        native.build_sample_index(lengths, document, sample, seq_length, extra)
        return sample
    return _sample_index_numpy(lengths, document, count, seq_length, extra, dtype)


def _sample_index_numpy(
    lengths: NDArray, document: NDArray[np.int32], count: int, seq_length: int, extra: int, dtype: np.dtype
) -> NDArray:
    sample = np.zeros((count + 1, 2), dtype)
    ends = np.cumsum(lengths[document], dtype=np.int64)
    walked = np.arange(1, count + 1, dtype=np.int64) * seq_length + extra  # tokens
    place = np.searchsorted(ends, walked, side="left")  # the first sequence by whose end so many were passed
    out = place == len(document)
    place[out] = len(document) - 1
    length = lengths[document[place]].astype(np.int64)
    sample[1:, 0] = place
    sample[1:, 1] = np.where(out, length - extra, walked - extra - (ends[place] - length))
    return sample
