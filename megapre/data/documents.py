"""Documents out of text files: .txt, .jsonl (plain, .gz, .zst) and .parquet.

A file is read in parts, so that several processes can share it: plain files are cut behind a line (.jsonl) or separator
(.txt), .parquet between row groups; a compressed file is one part. Where the cuts lie depends on the file alone.
"""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .errors import DataError

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BLOCK = 1 << 20


class Damaged(Exception):
    """A compressed file that cannot be read to its end."""


class Record(NamedTuple):
    """A document; or None and a problem; or None and no problem, where there is none. `at`: bytes of the part read."""

    text: str | None
    problem: str
    at: int


@dataclass(frozen=True)
class Part:
    """Bytes [start, stop) of a file, or row groups of a .parquet file; `size` is its share of the file's bytes.

    `separator`: in a .txt file, what stands between documents; None for a file that is one document.
    """

    path: str
    start: int
    stop: int
    size: int
    separator: str | None = None

    def name(self, number: int) -> str:
        """How to call document `number` of this part: file and line, row or document, counted from 1 in the file."""
        if self.path.endswith(".parquet"):
            return f"{self.path} row {_rows(self.path, 0, self.start) + number + 1}"
        if self.path.endswith(".txt"):
            if self.separator is None:
                return self.path
            return f"{self.path} document {_count(self.path, self.start, self.separator.encode()) + number + 1}"
        before = _count(self.path, self.start, b"\n")
        return f"{self.path} line {before + number + 1}"

    def digest(self) -> str:
        """SHA-256 of the bytes that the part is read from."""
        if self.path.endswith(".parquet"):
            ranges = _parquet_ranges(self.path, self.start, self.stop)
        else:
            ranges = [(self.start, self.stop)]
        hasher = hashlib.sha256()
        with open(self.path, "rb") as file:
            for start, stop in ranges:
                for block in _blocks(file, start, stop):
                    hasher.update(block)
        return hasher.hexdigest()


def expand(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that paths, folders (searched to their ends) and glob patterns name, in order, sorted within each.

    Raises DataError where one names nothing, an unknown kind of file, an empty file, or a file for the second time.
    """
    files: list[str] = []
    for given in (os.fspath(path) for path in inputs):
        if os.path.isdir(given):
            found = sorted(str(path) for path in Path(given).rglob("*") if path.is_file() and _known(str(path)))
            nothing = f"folder {given} holds no {', '.join(ENDINGS)} file"
        elif os.path.exists(given) or not glob.has_magic(given):
            found = [given] if os.path.exists(given) else []
            nothing = f"{given} does not exist"
        else:
            found = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
            nothing = f"pattern {given} matches no file"
        if not found:
            raise DataError(nothing)
        files += found
    if not files:
        raise DataError(f"no input is named; give {', '.join(ENDINGS)} files, folders of them, or patterns")
    for file in files:
        if not _known(file):
            raise DataError(f"{file} has an unknown ending; {', '.join(ENDINGS)} can be read")
        if os.path.getsize(file) == 0:
            raise DataError(f"{file} is empty (0 bytes)")
    if twice := sorted({file for file in files if files.count(file) > 1} if len(set(files)) < len(files) else ()):
        raise DataError(f"{twice[0]} is named twice among the inputs ({len(twice)} such files)")
    return files


def _known(path: str) -> bool:
    return path.endswith(ENDINGS)


def parts_of(path: str, target: int | None = None, separator: str | None = None) -> list[Part]:
    """A file in parts of about `target` bytes; one part if None, or where the file cannot be cut."""
    size = os.path.getsize(path)
    if path.endswith(".parquet"):
        groups = _parquet(path).metadata.num_row_groups
        per = groups if target is None else max(1, round(groups * target / size))
        edges = [*range(0, groups, per or 1), groups]
        return [Part(path, a, b, size * (b - a) // groups) for a, b in pairwise(edges)]
    between = {".jsonl": "\n", ".txt": separator}.get(os.path.splitext(path)[1])
    edges = [0, size]
    if target is not None and between is not None:
        edges = _edges(path, size, target, between.encode())
    kept = separator if path.endswith(".txt") else None
    return [Part(path, a, b, b - a, kept) for a, b in pairwise(edges)]


def _edges(path: str, size: int, target: int, between: bytes) -> list[int]:
    """0, the places behind the first `between` after each multiple of `target`, and the size."""
    edges = [0]
    with open(path, "rb") as file:
        while (wanted := edges[-1] + target) < size:
            tail = b""
            for block in _blocks(file, wanted, size):
                found = (tail + block).find(between)
                if found >= 0:
                    wanted += found - len(tail) + len(between)
                    break
                wanted += len(block)
                tail = (tail + block)[-len(between) + 1 :] if len(between) > 1 else b""
            edges.append(min(wanted, size))
    return edges if edges[-1] == size else [*edges, size]


def records(part: Part, json_key: str) -> Iterator[Record]:
    """What a part holds, in order: a Record for each line, row, or place between separators, blank ones too.

    Raises DataError where a file cannot be opened or lacks the column; what is wrong with one document is in its
    Record.
    """
    try:
        if part.path.endswith(".parquet"):
            yield from _from_parquet(part, json_key)
        elif part.path.endswith(".txt"):
            yield from _from_text(part)
        else:
            yield from _from_lines(part, json_key)
    except OSError as error:
        raise DataError(f"{part.path} cannot be read: {error.strerror or error}") from error


def _from_text(part: Part) -> Iterator[Record]:
    with open(part.path, "rb") as file:
        content = b"".join(_blocks(file, part.start, part.stop))
    pieces = [content] if part.separator is None else content.split(part.separator.encode())
    at = 0
    for piece in pieces:
        at += len(piece)
        record = _decoded(piece.removeprefix(b"\xef\xbb\xbf") if part.start == 0 and at == len(piece) else piece, at)
        if part.separator is not None and record.text is not None:  # a separator mostly has a line of its own
            record = record._replace(text=record.text.strip("\r\n") or None)
        yield record


def _decoded(content: bytes, at: int) -> Record:
    try:
        return Record(content.decode("utf-8"), "", at)
    except UnicodeDecodeError as error:
        return Record(None, _not_utf8(content, error), at)


def _not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    return f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8"


def _from_lines(part: Part, json_key: str) -> Iterator[Record]:
    with open(part.path, "rb") as raw:
        raw.seek(part.start)
        plain = part.path.endswith(".jsonl")
        lines: Iterable[bytes] = raw if plain else _decompressed(part.path, raw)
        at = 0
        try:
            for number, line in enumerate(lines):
                at = at + len(line) if plain else raw.tell()
                if number == 0 and part.start == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield _from_json(line, json_key, at) if line.strip() else Record(None, "", at)
                if plain and part.start + at >= part.stop:
                    break
        except Damaged as error:
            yield Record(None, f"the compressed file is broken from here on: {error}", part.size)


def _from_json(line: bytes, key: str, at: int) -> Record:
    try:
        found: Any = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:  # the position without the line, which is always the first here
        return Record(None, f"broken JSON: {error.msg} at character {error.pos}", at)
    except UnicodeDecodeError as error:
        return Record(None, f"broken JSON: {_not_utf8(line, error)}", at)
    except RecursionError:
        return Record(None, "broken JSON: nested too deeply", at)
    except ValueError as error:  # a number of thousands of digits
        return Record(None, f"broken JSON: {error}", at)
    if not isinstance(found, dict):
        return Record(None, f"a JSON {type(found).__name__}, not an object", at)
    if key not in found:
        return Record(None, f"no key '{key}'; there are {', '.join(map(repr, found)) or 'none'}", at)
    return _text(found[key], f"the value of '{key}'", at)


def _text(value: object, what: str, at: int) -> Record:
    if not isinstance(value, str):
        return Record(None, f"{what} is of type {type(value).__name__}, not a string", at)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return Record(None, f"{what} has half a surrogate pair at character {error.start}", at)
    return Record(value, "", at)


def _from_parquet(part: Part, key: str) -> Iterator[Record]:
    file = _parquet(part.path)
    columns = file.schema_arrow.names
    if key not in columns:
        raise DataError(f"{part.path} has no column '{key}'; there are {', '.join(map(repr, columns))}")
    rows, number = _rows(part.path, part.start, part.stop), 0
    batches = file.iter_batches(512, row_groups=list(range(part.start, part.stop)), columns=[key])
    while values := _next_values(part.path, batches):
        for value in values:
            number += 1
            yield _text(value, f"the value of '{key}'", part.size * number // rows)


def _next_values(path: str, batches: Iterator[Any]) -> list[object]:
    from pyarrow import ArrowException

    try:
        batch = next(batches, None)
        return [] if batch is None else batch.column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _parquet(path: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except ArrowException as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error


def _parquet_ranges(path: str, start: int, stop: int) -> list[tuple[int, int]]:
    """Where the columns of row groups lie in the file, and its footer, which says how to read them."""
    metadata = _parquet(path).metadata
    chunks = (metadata.row_group(group).column(c) for group in range(start, stop) for c in range(metadata.num_columns))
    places = [(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size) for chunk in chunks]
    size = os.path.getsize(path)
    return [*((first, first + length) for first, length in places), (size - metadata.serialized_size - 8, size)]


def _rows(path: str, start: int, stop: int) -> int:
    metadata = _parquet(path).metadata
    return sum(metadata.row_group(group).num_rows for group in range(start, stop))


def _decompressed(path: str, raw: BinaryIO) -> Iterator[bytes]:
    """The lines of a compressed file. Raises Damaged where it is cut short or broken."""
    try:
        yield from gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else _split_lines(_zstd_blocks(raw))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Damaged(error) from error


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    # The library's own stream reader ends in silence where the file is cut short.
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # as written by zstd --long=31
    frame = decompressor.decompressobj()
    within = False
    while block := raw.read(BLOCK):
        while block:
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise Damaged(error) from error
            within = not frame.eof
            block = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = decompressor.decompressobj()
    if within:
        raise Damaged("it ends within a frame")


def _split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []  # of a line that no block has ended yet
    for block in blocks:
        first, *more = block.split(b"\n")
        begun.append(first)
        if more:
            yield b"".join(begun)
            yield from more[:-1]
            begun = [more[-1]]
    if last := b"".join(begun):
        yield last


def _blocks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (block := file.read(min(BLOCK, stop - start))):
        start += len(block)
        yield block


def _count(path: str, stop: int, between: bytes) -> int:
    """How often `between` stands in the first `stop` bytes of a file. Only for naming what went wrong."""
    if stop == 0:
        return 0
    count, tail = 0, b""
    with open(path, "rb") as file:
        for block in _blocks(file, 0, stop):
            count += (tail + block).count(between)
            tail = block[len(block) - len(between) + 1 :]
    return count
