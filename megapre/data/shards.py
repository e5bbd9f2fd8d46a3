"""The work of tokenizing, cut into shards that are done once: planning, encoding one, and knowing that it is done.

The plan depends on the input files alone, never on the number of workers. A shard is a .bin, an .idx and, written last,
a manifest with a key: the hash of the bytes it was made from and of the options. A shard whose key is as it should be
is kept; everything else is made anew.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .atomic import write_whole
from .documents import Part, parts_of, records
from .errors import DataError
from .indexed import IndexedDataset, IndexedWriter, token_dtype
from .tokenizer import Tokenizer

FORMAT = 1  # part of every key: raise it when the same input gives other tokens
SMALLEST = 4 << 20  # bytes of input in a shard
MOST = 1024  # shards, unless there are more files that cannot be cut
NAMED = 100  # problems that a manifest names one by one
REPORT = 1 << 19  # bytes of input between two reports of progress


class Stopped(Exception):
    """Another shard failed, or the user interrupted: this one need not go on."""


@dataclass(frozen=True)
class Options:
    """What decides the tokens, besides the input."""

    tokenizer_sha256: str
    json_key: str
    append_eos: bool
    on_error: str
    separator: str | None


@dataclass(frozen=True)
class Shard:
    """One piece of the work; `parts` follow each other in the order of the input."""

    number: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(part.size for part in self.parts)

    def key(self, options: Options) -> str:
        """The hash of everything that decides the tokens."""
        facts = [FORMAT, asdict(options), [(part.digest(), part.start == 0) for part in self.parts]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def prefix(self, folder: Path) -> str:
        """Where its .bin, .idx and manifest (.json) lie."""
        return str(folder / f"shard-{self.number:05}")


@dataclass(frozen=True)
class Manifest:
    """What a finished shard holds; `bytes` of UTF-8 text; `problems` names the first of `skipped` documents."""

    key: str
    documents: int
    tokens: int
    bytes: int
    skipped: int
    problems: tuple[str, ...]


def plan(files: Sequence[str], separator: str | None) -> list[Shard]:
    """The files in shards of at least SMALLEST bytes, and at most about MOST of them."""
    target, total = SMALLEST, sum(map(os.path.getsize, files))
    while total > MOST * target:
        target *= 2
    shards: list[Shard] = []
    held: list[Part] = []
    size = 0
    for file in files:
        for part in parts_of(file, target, separator):
            held.append(part)
            size += part.size
            if size >= target:
                shards.append(Shard(len(shards), tuple(held)))
                held, size = [], 0
    return [*shards, Shard(len(shards), tuple(held))] if held else shards


def finished(shard: Shard, folder: Path, key: str) -> Manifest | None:
    """The manifest of a shard that is done and whole; None where it has to be made."""
    prefix = shard.prefix(folder)
    try:
        found = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        manifest = Manifest(**{**found, "problems": tuple(found["problems"])})
        whole = manifest.key == key and IndexedDataset(prefix).tokens == manifest.tokens
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return manifest if whole else None


def encode(
    shard: Shard, folder: Path, options: Options, tokenizer: Tokenizer, report: Callable[[int], None]
) -> Manifest:
    """Make a shard, or find it done. `report` is told of bytes read, and may raise Stopped.

    Raises DataError naming file and line of the first bad document if options.on_error is "fail".
    """
    key = shard.key(options)
    if (manifest := finished(shard, folder, key)) is not None:
        report(shard.size)
        return manifest
    prefix = shard.prefix(folder)
    Path(f"{prefix}.json").unlink(missing_ok=True)
    size, skipped = 0, 0
    problems: list[str] = []
    end = [] if tokenizer.eos_id is None or not options.append_eos else [tokenizer.eos_id]
    dtype = token_dtype(tokenizer.vocab_size)
    with IndexedWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        for part in shard.parts:
            told = 0
            for number, record in enumerate(records(part, options.json_key)):
                if record.at - told >= REPORT:
                    report(record.at - told)
                    told = record.at
                if record.text is not None:
                    size += len(record.text) if record.text.isascii() else len(record.text.encode())
                    ids = tokenizer.encode(record.text)
                    writer.add_document(np.array(ids + end if ids else ids, dtype))
                elif record.problem:
                    problem = f"{part.name(number)}: {record.problem}"
                    if options.on_error == "fail":
                        raise DataError(f"{problem} (--on-error skip passes over it)")
                    skipped += 1
                    if len(problems) < NAMED:
                        problems.append(problem)
            report(part.size - told)
        documents = writer.documents
    tokens = IndexedDataset(prefix).tokens
    manifest = Manifest(key, documents, tokens, size, skipped, tuple(problems))
    write_whole(f"{prefix}.json", json.dumps(asdict(manifest)).encode())
    return manifest
