"""Samples: which tokens, which labels, where there is a loss, where documents begin."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre.data import Blend, BlendIndex, DataError, GPTDataset, IndexedDataset, IndexedWriter, build_gpt_index

EOS = 9


def dataset_of(
    folder: Path,
    documents: list[list[int]],
    seq_length: int,
    *,
    extra: bool = True,
    keep: bool = False,
    **options: Any,
) -> tuple[GPTDataset, list[int]]:
    """A dataset of these documents, and its line: the documents in their shuffled order."""
    with IndexedWriter(folder / "x", vocab_size=100) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    indexed = IndexedDataset(folder / "x")
    index = build_gpt_index(indexed.lengths, np.arange(len(indexed)), None, seq_length, 3, extra, keep)
    line = [token for i in index.document.tolist() for token in indexed[i].tolist()]
    return GPTDataset(indexed, index, seq_length, add_extra_token=extra, **options), line


DOCUMENTS = st.lists(
    st.lists(st.integers(1, 8), max_size=7).map(lambda document: [*document, EOS]), min_size=2, max_size=12
)


@given(DOCUMENTS, st.integers(1, 9), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_samples_cut_the_line(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    s: int,
    extra: bool,
    keep: bool,
    known: bool,
    masked: bool,
) -> None:
    x = int(extra)
    if sum(map(len, documents)) < s + x:
        documents = [*documents, [*range(1, 9), EOS], [EOS]]
    options = {"eos_id": EOS if known else None, "mask_eos_loss": known and masked}
    dataset, line = dataset_of(tmp_path_factory.mktemp("d"), documents, s, extra=extra, keep=keep, **options)
    for i in range(len(dataset)):
        start = int(dataset.index.shuffle[i]) * s
        held = line[start : start + s + x]
        tokens, labels, mask, cuts = dataset.sample(i)
        assert tokens.tolist() == (held + [0] * s)[:s]
        assert labels.tolist()[: len(held) - 1] == held[1:]
        # A loss wherever the next token is known, and the token before it is no end of a document if those are masked.
        wanted = [j + 1 < len(held) and not (known and masked and held[j] == EOS) for j in range(s)]
        assert mask.tolist() == wanted
        # A document starts after every EOS, whether it is known or the index tells.
        ends = [j + 1 for j, token in enumerate(held[: min(s, len(held) - 1)]) if token == EOS]
        assert cuts.tolist() == sorted({0, s, *ends})
        positions = dataset.sample(i).positions
        assert positions.tolist() == [j - max(c for c in cuts[:-1].tolist() if c <= j) for j in range(s)]


def test_documents_are_told_apart_without_an_end_token(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [[1, 2, 3], [4, 5], [6, 7, 8, 1]], 8)
    order = dataset.index.document.tolist()
    starts = np.cumsum([0] + [int(dataset.dataset.lengths[i]) for i in order]).tolist()
    assert dataset.sample(0).cu_seqlens.tolist() == [*(start for start in starts if start < 8), 8]


def test_an_end_token_within_a_document_ends_it(tmp_path: Path) -> None:
    dataset, line = dataset_of(tmp_path, [[1, EOS, 2, 3, 4, EOS]], 5, eos_id=EOS)
    assert line == [1, EOS, 2, 3, 4, EOS]
    assert dataset.sample(0).cu_seqlens.tolist() == [0, 2, 5]
    assert dataset.sample(0).positions.tolist() == [0, 1, 0, 1, 2]


def test_padding_of_a_partial_sample_is_no_end_token(tmp_path: Path) -> None:
    """Padding is token 0, and so is the end-of-document token of some vocabularies."""
    dataset, _ = dataset_of(tmp_path, [[1, 2, 3, 0]], 6, keep=True, eos_id=0)
    sample = dataset.sample(0)
    assert sample.tokens.tolist() == [1, 2, 3, 0, 0, 0]
    assert sample.mask.tolist() == [True, True, True, False, False, False]
    assert sample.cu_seqlens.tolist() == [0, 6]  # and of padding no document is made


def test_sample_is_pure(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [[1, 2, 3, 4, 5, 6, 7]] * 5, 4)
    first = dataset.sample(2)
    first.tokens[:] = 77
    first.labels[:] = 77
    assert 77 not in dataset.sample(2).tokens


def test_out_of_range(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [[1, 2, 3, 4, 5, 6, 7]], 4)
    for i in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"sample {i} of 1"):
            dataset.sample(i)


def test_too_short_for_one_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 documents of this split are shorter than one sample of 8 \+ 1 tokens"):
        dataset_of(tmp_path, [[1, 2, 3], [4, 5]], 8)


def test_masking_needs_to_know_the_token(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mask_eos_loss needs the end-of-document token"):
        dataset_of(tmp_path, [[1, 2, 3]], 2, mask_eos_loss=True)


def test_a_blend_that_asks_for_too_much(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [[1, 2, 3, 4, 5, 6, 7]], 3)
    index = BlendIndex(np.zeros(3, np.int16), np.arange(3))
    with pytest.raises(DataError, match="dataset 0 has 2 samples, but the blend asks for 3"):
        Blend([dataset], index)
