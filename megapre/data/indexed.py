"""Token files in Megatron's format: `.bin` holds the tokens, `.idx` says where each sequence lies.

`.bin` is the tokens of all sequences, little-endian, concatenated, without a header. `.idx` is packed little-endian:

    offset      bytes   content
    0           9       magic "MMIDIDX" and two zero bytes
    9           8       uint64 version = 1
    17          1       uint8 dtype code (DTYPES)
    18          8       uint64 S, number of sequences
    26          8       uint64 D, length of document_indices = documents + 1
    34          4 S     int32 lengths of the sequences in tokens
    34 + 4S     8 S     int64 byte offset of each sequence in .bin
    34 + 12S    8 D     int64 document_indices: 0, then the index of the first sequence after each document

A document is one or more sequences; here every non-empty document is written as one sequence. An empty document adds no
sequence but repeats its document index. Files of megapre and Megatron-LM (core/datasets/indexed_dataset.py) are the
same.
"""

import os
import shutil
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# GPT-NeoX swaps codes 6 and 7, so floats are read as Megatron means them and never written.
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST = 2**31 - 1  # lengths are int32


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron writes for a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def bare_prefix(prefix: str | os.PathLike[str]) -> str:
    """The prefix without a `.bin` or `.idx` that a shell's completion may have left on it."""
    path = os.fspath(prefix)
    return path[:-4] if path.endswith((".bin", ".idx")) else path


class IndexedDataset:
    """Sequences of tokens in `PREFIX.bin` and `PREFIX.idx`, read through memory maps; nothing is copied on opening.

    Attributes: `lengths` int32 [S] tokens of each sequence; `offsets` int64 [S] bytes into .bin; `document_indices`
    int64 [documents + 1]; `dtype` of the tokens. Raises DataError where a file is missing, truncated or of another
    format.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = bare_prefix(prefix)
        index = _map(f"{self.prefix}.idx")
        self.dtype, sequences, documents = _read_header(f"{self.prefix}.idx", index)
        at = HEADER.size
        self.lengths: NDArray[np.int32] = index[at : at + 4 * sequences].view("<i4")
        at += 4 * sequences
        self.offsets: NDArray[np.int64] = index[at : at + 8 * sequences].view("<i8")
        at += 8 * sequences
        self.document_indices: NDArray[np.int64] = index[at : at + 8 * documents].view("<i8")
        self._bytes = _map(f"{self.prefix}.bin")
        self._check()

    def _check(self) -> None:
        ends = self.document_indices
        if len(ends) == 0 or ends[0] != 0 or ends[-1] != len(self):
            found = f"{ends[0]}..{ends[-1]}" if len(ends) else "none"
            raise DataError(
                f"{self.prefix}.idx: document indices run {found}, but must run 0..{len(self)}, the sequences"
            )
        if len(self) == 0:
            return
        size, item = self._bytes.size, self.dtype.itemsize
        end = int(self.offsets[-1]) + int(self.lengths[-1]) * item
        if end != size:  # the common case costs nothing; only odd files pay for a look at every sequence
            end = int((self.offsets + self.lengths.astype(np.int64) * item).max())
        if end > size or int(self.lengths[-1]) < 0 or int(self.offsets[0]) < 0:
            raise DataError(
                f"{self.prefix}.bin is truncated or belongs to another .idx: it has {size:,} bytes, "
                f"but {self.prefix}.idx describes {len(self):,} sequences that end at byte {end:,}"
            )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> NDArray:
        """`length` tokens (to the end if None) of a sequence from token `offset`, as a read-only view of the file.

        Raises IndexError where the range leaves the sequence.
        """
        whole = int(self.lengths[sequence])
        count = whole - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > whole:
            raise IndexError(f"tokens [{offset}, {offset + count}) of a sequence of {whole}")
        start = int(self.offsets[sequence]) + offset * self.dtype.itemsize
        return self._bytes[start : start + count * self.dtype.itemsize].view(self.dtype)

    def __getitem__(self, sequence: int) -> NDArray:
        """All tokens of a sequence."""
        if not -len(self) <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        return self.get(sequence)

    def document(self, number: int) -> NDArray:
        """All tokens of a document: its sequences, one after the other."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        first, last = int(self.document_indices[number]), int(self.document_indices[number + 1])
        if last == first + 1:
            return self.get(first)
        return np.concatenate([np.empty(0, self.dtype), *(self.get(i) for i in range(first, last))])

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)  # another process maps the files anew

    def __repr__(self) -> str:
        return f"IndexedDataset({self.prefix!r}, {self.documents:,} documents, {self.tokens:,} tokens, {self.dtype})"


def _map(path: str) -> NDArray[np.uint8]:
    """The bytes of a file as a read-only map; an empty file (which mmap refuses) as an empty array."""
    try:
        if os.path.getsize(path) == 0:
            return np.empty(0, np.uint8)
        # A plain array over the map: slicing np.memmap itself costs several times as much.
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; a dataset is named by its prefix, without .bin or .idx") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _read_header(path: str, index: NDArray[np.uint8]) -> tuple[np.dtype, int, int]:
    """Token dtype, number of sequences, length of document_indices. Raises DataError on any other file."""
    if index.size < HEADER.size:
        raise DataError(f"{path} is truncated: {index.size} bytes, but its header alone has {HEADER.size}")
    magic, version, code, sequences, documents = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise DataError(f"{path} is no Megatron index: it starts with {magic.hex(' ')}, not with {MAGIC.hex(' ')}")
    if version != VERSION:
        raise DataError(f"{path} has format version {version}; version {VERSION} is known")
    if code not in DTYPES:
        raise DataError(f"{path} has dtype code {code}; known codes are 1 to 8")
    size = HEADER.size + 12 * sequences + 8 * documents
    if index.size != size:
        kind = "truncated" if index.size < size else "damaged"
        raise DataError(
            f"{path} is {kind}: {index.size:,} bytes, but {sequences:,} sequences and {documents:,} document indices "
            f"take {size:,}"
        )
    return DTYPES[code], sequences, documents


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`, document by document, holding 8 bytes a document in memory.

    Both files grow under temporary names and take their own only in `finalize`; an exception inside the `with` block,
    or `abort`, leaves nothing behind. The index comes last: where there is an `.idx`, the dataset is whole.

        with IndexedWriter("corpus_text_document", vocab_size=50257) as writer:
            writer.add_document([15496, 995, 50256])

    `vocab_size` chooses the dtype as Megatron does and bounds the ids; `dtype` alone bounds them by its range. Raises
    DataError on ids out of range and on a document of more than 2^31 - 1 tokens; OSError where the disk refuses.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], *, vocab_size: int | None = None, dtype: DTypeLike | None = None
    ) -> None:
        if (vocab_size is None) == (dtype is None):
            raise ValueError("give either vocab_size or dtype")
        self.prefix = bare_prefix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<") if vocab_size is None else token_dtype(vocab_size)
        if self.dtype not in CODES or self.dtype.kind == "f":
            raise ValueError(f"tokens of dtype {self.dtype} cannot be written; integers of 8, 16, 32, 64 bits can")
        info = np.iinfo(self.dtype)
        self._lowest = 0 if vocab_size is not None else int(info.min)
        self._highest = vocab_size - 1 if vocab_size is not None else int(info.max)
        self._lengths = array("i")
        self._document_indices = array("q", [0])
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        # Each process has names of its own; the leading dot keeps them out of globs over *.bin.
        folder, name = os.path.split(self.prefix)
        self._temporary = os.path.join(folder, f".{name}.{os.getpid()}")
        self._bin: BinaryIO | None = open(f"{self._temporary}.bin", "wb", buffering=1 << 20)  # noqa: SIM115

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._document_indices) - 1

    def add_document(self, tokens: ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append a document of `tokens`; `lengths` cuts it into sequences (default: one, or none if it is empty)."""
        given = np.asarray(tokens)
        if given.size and given.dtype.kind not in "iu":
            raise ValueError(f"tokens are {given.dtype}; integers are needed")
        if given.ndim != 1:
            raise ValueError(f"tokens have shape {given.shape}; one dimension is needed")
        if given.size > LONGEST:
            raise DataError(f"a document of {given.size:,} tokens; the format holds at most {LONGEST:,} in a sequence")
        if given.size and (int(given.max()) > self._highest or int(given.min()) < self._lowest):
            raise DataError(
                f"token ids {given.min()}..{given.max()} in document {self.documents}; allowed are "
                f"{self._lowest}..{self._highest}"
            )
        cuts = ([given.size] if given.size else []) if lengths is None else list(lengths)
        if sum(cuts) != given.size or any(cut < 0 for cut in cuts):
            raise ValueError(f"lengths {cuts} do not add up to {given.size} tokens")
        self._file.write(np.ascontiguousarray(given, self.dtype).data)
        self._lengths.extend(cuts)
        self._document_indices.append(len(self._lengths))

    def add_index(self, prefix: str | os.PathLike[str]) -> None:
        """Append all documents of another dataset of the same dtype, whose tokens must lie in order without gaps."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(f"{other.prefix} has {other.dtype} tokens; they cannot be appended to {self.dtype} ones")
        if not np.array_equal(other.offsets, _offsets(other.lengths, other.dtype)):
            raise DataError(
                f"{other.prefix}.idx does not list its sequences in the order of the .bin; cannot be merged"
            )
        first = len(self._lengths)
        with open(f"{other.prefix}.bin", "rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 24)
        self._lengths.frombytes(other.lengths.tobytes())
        self._document_indices.frombytes((other.document_indices[1:] + first).tobytes())

    def finalize(self) -> None:
        """Sync both files and give them their names. Afterwards the writer is closed."""
        file = self._file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        lengths = np.frombuffer(self._lengths, "<i4")
        documents = np.frombuffer(self._document_indices, "<i8")
        with open(f"{self._temporary}.idx", "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(documents)))
            for part in (lengths, _offsets(lengths, self.dtype), documents):
                index.write(part.tobytes())
            index.flush()
            os.fsync(index.fileno())
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)  # an old index must never meet the new tokens
        os.replace(f"{self._temporary}.bin", f"{self.prefix}.bin")
        os.replace(f"{self._temporary}.idx", f"{self.prefix}.idx")
        self._bin = None

    def abort(self) -> None:
        """Drop what was written. Does nothing after `finalize`."""
        if self._bin is None:
            return
        file, self._bin = self._bin, None
        try:
            file.close()
        except OSError:  # a full disk refuses the last buffer too; the file goes anyway
            pass
        finally:
            for ending in ("bin", "idx"):
                Path(f"{self._temporary}.{ending}").unlink(missing_ok=True)

    @property
    def _file(self) -> BinaryIO:
        if self._bin is None:
            raise ValueError(f"the writer of {self.prefix} is closed")
        return self._bin

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._bin is not None:
                self.finalize()
        finally:
            self.abort()


def _offsets(lengths: NDArray[np.int32], dtype: np.dtype) -> NDArray[np.int64]:
    """Byte offset of each sequence, in int64: the sum of int32 lengths leaves 31 bits at two billion tokens."""
    offsets = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    return offsets
