"""The reader and the writer of .bin/.idx: what goes in comes out, and nothing half written is ever seen."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapre.data import DataError, IndexedDataset, IndexedWriter
from megapre.data.indexed import CODES, HEADER, _offsets, token_dtype

INTEGERS = [dtype for dtype in CODES if dtype.kind in "iu"]


def documents_of(dtype: np.dtype) -> st.SearchStrategy:
    """Documents as lists of sequences as lists of ids."""
    info = np.iinfo(dtype)
    token = st.integers(int(info.min), int(info.max))
    return st.lists(st.lists(st.lists(token, max_size=6), max_size=3), max_size=8)


def write(prefix: Path, documents: list[list[list[int]]], dtype: np.dtype) -> IndexedDataset:
    with IndexedWriter(prefix, dtype=dtype) as writer:
        for document in documents:
            tokens = np.array([token for sequence in document for token in sequence], dtype)
            writer.add_document(tokens, [len(sequence) for sequence in document])
    return IndexedDataset(prefix)


@settings(max_examples=50)
@given(st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(INTEGERS))
    documents = data.draw(documents_of(dtype))
    dataset = write(tmp_path_factory.mktemp("round") / "x", documents, dtype)
    sequences = [sequence for document in documents for sequence in document]
    assert dataset.dtype == dtype
    assert len(dataset) == len(sequences)
    assert dataset.documents == len(documents)
    assert dataset.tokens == sum(map(len, sequences))
    for i, sequence in enumerate(sequences):
        assert dataset[i].tolist() == sequence
        for offset in range(len(sequence) + 1):
            assert (
                dataset.get(i, offset, (len(sequence) - offset) // 2).tolist()
                == sequence[offset:][: (len(sequence) - offset) // 2]
            )
    for i, document in enumerate(documents):
        assert dataset.document(i).tolist() == [token for sequence in document for token in sequence]


@settings(max_examples=30)  # each syncs several files to the disk
@given(st.data())
def test_merging_equals_writing_in_a_row(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("merge")
    dtype = np.dtype("<u2")
    pieces = data.draw(st.lists(documents_of(dtype), min_size=1, max_size=4))
    with IndexedWriter(folder / "merged", dtype=dtype) as writer:
        for i, piece in enumerate(pieces):
            writer.add_index(write(folder / f"piece{i}", piece, dtype).prefix)
    write(folder / "row", [document for piece in pieces for document in piece], dtype)
    for ending in ("bin", "idx"):
        assert (folder / f"merged.{ending}").read_bytes() == (folder / f"row.{ending}").read_bytes()


def test_an_empty_document_repeats_its_index_and_adds_no_sequence(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", vocab_size=10) as writer:
        for document in ([1, 2], [], [3]):
            writer.add_document(np.array(document, np.int64))
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.document_indices.tolist() == [0, 1, 1, 2]
    assert dataset.lengths.tolist() == [2, 1]


@pytest.mark.parametrize(("vocab", "dtype"), [(65_499, "<u2"), (65_500, "<i4"), (128_256, "<i4")])
def test_dtype_by_vocabulary(vocab: int, dtype: str) -> None:
    assert token_dtype(vocab) == np.dtype(dtype)


def test_offsets_pass_two_and_four_gigabytes() -> None:
    lengths = np.full(5, 2**31 - 1, np.int32)
    assert _offsets(lengths, np.dtype("<i4")).tolist() == [4 * i * (2**31 - 1) for i in range(5)]


def test_a_dataset_beyond_two_gigabytes_is_read_where_it_lies(tmp_path: Path) -> None:
    """A sparse .bin: five billion tokens by its index, a few pages by its size on disk."""
    lengths = np.full(5, 10**9, "<i4")
    offsets = np.arange(5, dtype="<i8") * 2 * 10**9
    documents = np.arange(6, dtype="<i8")
    header = HEADER.pack(b"MMIDIDX\0\0", 1, 8, 5, 6)
    (tmp_path / "x.idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + documents.tobytes())
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(10**10)
        file.seek(10**10 - 4)
        file.write(np.array([17, 23], "<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.tokens == 5 * 10**9
    assert dataset.get(4, 10**9 - 3).tolist() == [0, 17, 23]


def test_prefix_may_carry_an_ending_and_datasets_travel_between_processes(tmp_path: Path) -> None:
    import pickle

    write(tmp_path / "x", [[[1, 2]]], np.dtype("<u2"))
    dataset = pickle.loads(pickle.dumps(IndexedDataset(f"{tmp_path}/x.bin")))
    assert dataset[0].tolist() == [1, 2]


def test_reads_leave_no_sequence(tmp_path: Path) -> None:
    dataset = write(tmp_path / "x", [[[1, 2, 3]], [[4]]], np.dtype("<u2"))
    for offset, length in ((0, 4), (3, 1), (-1, 1), (2, -1), (4, None)):
        with pytest.raises(IndexError):
            dataset.get(0, offset, length)
    with pytest.raises(IndexError):
        dataset[2]
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 9


class TestBrokenFiles:
    """Each names the file, what it has, and what it should have."""

    @pytest.fixture
    def prefix(self, tmp_path: Path) -> Path:
        write(tmp_path / "x", [[[1, 2, 3]], [[4, 5]]], np.dtype("<u2"))
        return tmp_path / "x"

    def test_missing(self, prefix: Path) -> None:
        with pytest.raises(DataError, match=r"nothing\.idx does not exist"):
            IndexedDataset(prefix.with_name("nothing"))
        prefix.with_suffix(".bin").unlink()
        with pytest.raises(DataError, match=r"x\.bin does not exist"):
            IndexedDataset(prefix)

    @pytest.mark.parametrize("kept", [0, 1, 8, 9])
    def test_truncated_bin(self, prefix: Path, kept: int) -> None:
        path = prefix.with_suffix(".bin")
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(
            DataError, match=rf"x\.bin is truncated.* has {kept} bytes.* 2 sequences that end at byte 10"
        ):
            IndexedDataset(prefix)

    def test_truncated_idx(self, prefix: Path) -> None:
        path = prefix.with_suffix(".idx")
        whole = path.read_bytes()
        for kept in range(len(whole)):
            path.write_bytes(whole[:kept])
            with pytest.raises(DataError, match=rf"x\.idx is truncated: {kept} bytes"):
                IndexedDataset(prefix)
        path.write_bytes(whole + b"\0")
        with pytest.raises(DataError, match="damaged"):
            IndexedDataset(prefix)

    @pytest.mark.parametrize(
        ("at", "byte", "message"),
        [(0, 0, "no Megatron index"), (9, 2, "format version 2"), (17, 9, "dtype code 9"), (17, 0, "dtype code 0")],
    )
    def test_header(self, prefix: Path, at: int, byte: int, message: str) -> None:
        path = prefix.with_suffix(".idx")
        content = bytearray(path.read_bytes())
        content[at] = byte
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            IndexedDataset(prefix)

    def test_document_indices_that_do_not_cover_the_sequences(self, prefix: Path) -> None:
        path = prefix.with_suffix(".idx")
        content = path.read_bytes()
        path.write_bytes(content[:-8] + (1).to_bytes(8, "little"))
        with pytest.raises(DataError, match=r"run 0\.\.1, but must run 0\.\.2"):
            IndexedDataset(prefix)


class TestWriting:
    def test_ids_must_fit(self, tmp_path: Path) -> None:
        with IndexedWriter(tmp_path / "x", vocab_size=100) as writer:
            for bad in ([99, 100], [-1]):
                with pytest.raises(DataError, match=r"allowed are 0\.\.99"):
                    writer.add_document(bad)
            writer.add_document([99])
        with IndexedWriter(tmp_path / "y", dtype=np.uint16) as writer, pytest.raises(DataError, match="65535"):
            writer.add_document([65_536])

    def test_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="either"):
            IndexedWriter(tmp_path / "x")
        for dtype in (np.float32, np.uint32):
            with pytest.raises(ValueError, match="cannot be written"):
                IndexedWriter(tmp_path / "x", dtype=dtype)
        with IndexedWriter(tmp_path / "x", vocab_size=9) as writer:
            with pytest.raises(ValueError, match="integers"):
                writer.add_document([0.5])
            with pytest.raises(ValueError, match="one dimension"):
                writer.add_document([[1]])
            with pytest.raises(ValueError, match="add up"):
                writer.add_document([1, 2], lengths=[1])
        with pytest.raises(ValueError, match="closed"):
            writer.add_document([1])

    def test_an_exception_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", vocab_size=9) as writer:
            writer.add_document([1])
            raise KeyError
        assert list(tmp_path.iterdir()) == []

    def test_an_exception_leaves_what_was_there(self, tmp_path: Path) -> None:
        write(tmp_path / "x", [[[1]]], np.dtype("<u2"))
        with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", vocab_size=9) as writer:
            writer.add_document([2, 3])
            raise KeyError
        assert IndexedDataset(tmp_path / "x")[0].tolist() == [1]

    def test_a_dataset_is_replaced_whole(self, tmp_path: Path) -> None:
        write(tmp_path / "x", [[[1]]], np.dtype("<u2"))
        old = IndexedDataset(tmp_path / "x")
        write(tmp_path / "x", [[[2, 3]]], np.dtype("<i4"))
        assert IndexedDataset(tmp_path / "x")[0].tolist() == [2, 3]
        assert old[0].tolist() == [1]  # who has it open goes on reading the old one

    def test_a_killed_writer_leaves_no_dataset(self, tmp_path: Path) -> None:
        script = (
            "import os, signal; from megapre.data import IndexedWriter\n"
            f"writer = IndexedWriter({str(tmp_path / 'x')!r}, vocab_size=9)\n"
            "for i in range(10000): writer.add_document([1, 2, 3] * 100)\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        done = subprocess.run([sys.executable, "-c", script], check=False)
        assert done.returncode == -signal.SIGKILL
        assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
        with pytest.raises(DataError, match="does not exist"):
            IndexedDataset(tmp_path / "x")

    def test_merging_refuses_other_dtypes(self, tmp_path: Path) -> None:
        write(tmp_path / "x", [[[1]]], np.dtype("<i4"))
        with IndexedWriter(tmp_path / "y", vocab_size=9) as writer, pytest.raises(DataError, match="int32"):
            writer.add_index(tmp_path / "x")
