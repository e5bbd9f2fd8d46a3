"""Sample i as tokens: one dataset, and blends of several. All of it is a pure function of files, seed and lengths.

A sample of s tokens may span several documents. A new one starts where the index says so, and after each
end-of-document token where that is known; in files whose documents end in it these are the same places.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .blend import BlendIndex
from .errors import DataError
from .gpt_index import GPTIndex
from .indexed import IndexedDataset

IGNORE = -100  # a label without loss


class Sample(NamedTuple):
    """One sample; s = seq_length.

    tokens, labels: int64 [s], views of one array: labels[i] is the token after tokens[i].
    mask: bool [s], False where there is no loss: behind the end of the data, and at end-of-document tokens if asked.
    cu_seqlens: int32 [documents + 1], 0 first, s last.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    mask: NDArray[np.bool_]
    cu_seqlens: NDArray[np.int32]

    @property
    def positions(self) -> NDArray[np.int64]:
        """int64 [s], starting at 0 in each document."""
        starts = self.cu_seqlens[:-1].astype(np.int64)
        return np.arange(len(self.tokens)) - np.repeat(starts, np.diff(self.cu_seqlens))


class Samples(Protocol):
    """What a loader reads: a fixed number of samples, each a pure function of its number."""

    def __len__(self) -> int: ...
    def sample(self, i: int) -> Sample: ...


class GPTDataset:
    """The samples that a GPTIndex cuts from an IndexedDataset.

    `eos_id` is the end-of-document token, None where it is unknown; `mask_eos_loss` takes the loss off the positions
    that hold it (what follows is another document). Raises DataError where the index has no sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        index: GPTIndex,
        seq_length: int,
        *,
        add_extra_token: bool = True,
        eos_id: int | None = None,
        mask_eos_loss: bool = False,
    ) -> None:
        if mask_eos_loss and eos_id is None:
            raise DataError(
                f"mask_eos_loss needs the end-of-document token, but {dataset.prefix} has no sidecar that names one; "
                "tokenize with megapre or set mask_eos_loss = false"
            )
        if index.samples == 0:
            raise DataError(
                f"{dataset.prefix}: {len(index.document):,} documents of this split are shorter than one sample of "
                f"{seq_length} + {int(add_extra_token)} tokens; shorten seq_length or give the split more documents"
            )
        self.dataset = dataset
        self.index = index
        self.seq_length = seq_length
        self.eos_id = eos_id
        self._extra = int(add_extra_token)
        self._mask_eos = mask_eos_loss

    def __len__(self) -> int:
        return self.index.samples

    def parts(self, i: int) -> list[NDArray]:
        """The s + x tokens of sample i (fewer in a partial last sample), sequence by sequence, as views of the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        row = int(self.index.shuffle[i])
        (first, start), (last, stop) = self.index.sample[row : row + 2].tolist()
        stop += self._extra
        if first == last:
            return [self.dataset.get(int(self.index.document[first]), start, stop - start)]
        documents = self.index.document[first : last + 1].tolist()
        return [
            self.dataset.get(documents[0], start),
            *(self.dataset.get(document) for document in documents[1:-1]),
            self.dataset.get(documents[-1], 0, stop),
        ]

    def sample(self, i: int) -> Sample:
        """Sample i. Raises IndexError beyond the last."""
        s = self.seq_length
        parts = self.parts(i)
        line = np.zeros(s + 1, np.int64)
        held = sum(map(len, parts))
        np.concatenate(parts, out=line[:held])
        tokens, labels = line[:-1], line[1:]
        mask = np.ones(s, np.bool_)
        mask[max(held - 1, 0) :] = False  # the token at held - 1 has no successor; behind it is padding
        starts = set(accumulate(map(len, parts[:-1])))
        if self.eos_id is not None:
            ends = np.flatnonzero(tokens[:held] == self.eos_id)
            starts.update((ends + 1).tolist())
            if self._mask_eos:
                mask[ends] = False
        # Padding belongs to the last document, so that no document is made of it.
        inner = sorted(start for start in starts if 0 < start < min(held, s))
        cu_seqlens = np.array([0, *inner, s], np.int32)
        return Sample(tokens, labels, mask, cu_seqlens)


class Blend:
    """Samples of several datasets in the order of a BlendIndex. Raises DataError where a dataset has too few."""

    def __init__(self, datasets: Sequence[Samples], index: BlendIndex, names: Sequence[str] = ()) -> None:
        self.datasets = tuple(datasets)
        self.index = index
        for d, dataset in enumerate(self.datasets):
            asked = index.sample[index.dataset == d]
            if len(asked) and int(asked.max()) >= len(dataset):
                name = names[d] if names else f"dataset {d}"
                raise DataError(f"{name} has {len(dataset):,} samples, but the blend asks for {int(asked.max()) + 1:,}")

    def __len__(self) -> int:
        return len(self.index.dataset)

    def sample(self, i: int) -> Sample:
        """Sample i. Raises IndexError beyond the last."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self.datasets[int(self.index.dataset[i])].sample(int(self.index.sample[i]))
