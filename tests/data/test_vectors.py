"""Files and index arrays against vectors that Megatron-LM produced."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megapre.data import (
    GPTDataset,
    IndexedDataset,
    IndexedWriter,
    build_blend,
    build_exhaustive_blend,
    build_gpt_index,
    split_ranges,
)

LENGTHS = np.array([7919 * i % 97 + 1 for i in range(1000)], np.int32)


def short_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix = str(tmp_path_factory.mktemp("corpus") / "c_text_document")
    with IndexedWriter(prefix, vocab_size=50257) as writer:
        for i, length in enumerate(LENGTHS.tolist()):
            writer.add_document([(31 * i + 17 * j) % 50000 + 1 for j in range(length - 1)] + [0])
    return IndexedDataset(prefix)


def test_numpy_still_shuffles_as_megatron_saw_it() -> None:
    random = np.random.RandomState(1234)
    documents, samples = np.arange(10, dtype=np.int32), np.arange(8, dtype=np.uint32)
    random.shuffle(documents)
    random.shuffle(samples)
    assert documents.tolist() == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]
    assert samples.tolist() == [7, 5, 6, 0, 4, 3, 2, 1]


def test_three_documents_byte_for_byte(tmp_path: Path) -> None:
    prefix = tmp_path / "tiny"
    with IndexedWriter(prefix, dtype=np.uint16) as writer:
        for document in ([1, 2, 3], [4, 5], [6]):
            writer.add_document(document)
    assert prefix.with_suffix(".bin").read_bytes().hex() == "010002000300040005000600"
    assert prefix.with_suffix(".idx").read_bytes() == bytes.fromhex(
        "4d4d49444944580000 0100000000000000 08 0300000000000000 0400000000000000"  # magic, version, dtype, S, D
        "03000000 02000000 01000000"  # lengths
        "0000000000000000 0600000000000000 0a00000000000000"  # offsets
        "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # document indices
    )


def test_a_thousand_documents_byte_for_byte(corpus: IndexedDataset) -> None:
    assert corpus.tokens == 49_019
    assert file_hash(f"{corpus.prefix}.bin") == "4d01f8d583da21062e421e872d2e9cb79eafeecb340895dbeb27caec7b702191"
    assert file_hash(f"{corpus.prefix}.idx") == "4c123b7ac470e8a5db1d7492fbec1f4b07480e479538674c9fc92afc8e92694c"


@pytest.mark.parametrize(
    ("documents", "asked", "keep", "epochs", "count", "hashes"),
    [
        (1000, None, False, 1, 382, ("4654e92b166be9fc", "bdb847d907307b54", "770d505bc3e17d27")),
        (949, 300, False, 1, 363, ("866ca01c419842d2", "1019a84073f05d9b", "541b8afd6750ea07")),
        (949, 1000, False, 3, 1089, ("ef7af64f1e772164", "e3c5d88ef558404f", "ef7d847c3bd798eb")),
        (1000, None, True, 1, 383, ("4654e92b166be9fc", "eb007db4b1f4f63d", "6bbb1b8398586c67")),
    ],
)
def test_gpt_index(
    native: bool, documents: int, asked: int | None, keep: bool, epochs: int, count: int, hashes: tuple[str, ...]
) -> None:
    index = build_gpt_index(LENGTHS, np.arange(documents), asked, 128, 1234, keep_partial=keep)
    assert len(index.document) == epochs * documents
    assert index.samples == count
    assert (index.document.dtype, index.sample.dtype, index.shuffle.dtype) == (np.int32, np.int32, np.uint32)
    assert tuple(map(short_hash, index)) == hashes


def test_gpt_index_rows(native: bool) -> None:
    whole = build_gpt_index(LENGTHS, np.arange(1000), None, 128, 1234)
    assert whole.document[:4].tolist() == [681, 990, 155, 768]
    assert whole.sample[:4].tolist() == [[0, 0], [3, 15], [4, 56], [7, 13]]
    assert build_gpt_index(LENGTHS, np.arange(949), 300, 128, 1234).sample[-1].tolist() == [948, 50]
    assert build_gpt_index(LENGTHS, np.arange(949), 1000, 128, 1234).sample[-1].tolist() == [2844, 11]
    partial = build_gpt_index(LENGTHS, np.arange(1000), None, 128, 1234, keep_partial=True)
    assert partial.sample[-2:].tolist() == [[997, 71], [999, 90]]


def test_split_of_a_thousand() -> None:
    assert split_ranges("949,50,1", 1000) == {"train": (0, 949), "valid": (949, 999), "test": (999, 1000)}


def test_samples_lie_where_the_arithmetic_says(corpus: IndexedDataset) -> None:
    """Token j of the shuffled line of documents is known in closed form; sample i holds 128 and one of them."""
    index = build_gpt_index(corpus.lengths, np.arange(1000), None, 128, 1234)
    line = np.concatenate([corpus[i] for i in index.document.tolist()])
    dataset = GPTDataset(corpus, index, 128)
    for i in range(len(dataset)):
        start = int(index.shuffle[i]) * 128
        sample = dataset.sample(i)
        assert np.array_equal(sample.tokens, line[start : start + 128])
        assert np.array_equal(sample.labels, line[start + 1 : start + 129])
        assert sample.mask.all()


def test_weighted_blend(native: bool) -> None:
    dataset, sample = build_blend([0.3, 0.5, 0.2], 20)
    assert dataset.tolist() == [1, 0, 2, 1, 0, 1, 2, 1, 0, 1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
    assert sample.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 3, 5, 2, 6, 4, 7, 3, 8, 5, 9]
    assert (short_hash(dataset), short_hash(sample)) == ("5dd9874a3e03f7c7", "39a47f5d410c5fde")
    assert (dataset.dtype, sample.dtype) == (np.int16, np.int64)


def test_exhaustive_blend(native: bool) -> None:
    dataset, sample = build_exhaustive_blend([3, 5, 2])
    assert dataset.tolist() == [1, 0, 2, 1, 0, 1, 2, 1, 0, 1]
    assert sample.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]
