"""Texts in files of every kind, and what became of them as datasets."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from megapre.data import IndexedDataset

TEXTS = ["the cat sat on the mat", "", "naïve “quotes” 12³", "line one\nline two\n", "x" * 300, " the dog "]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({key: text, "n": i}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(path: Path, texts: list[str | None], rows: int = 2) -> None:
    parquet.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=rows)


def tokens_of(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.documents)]


def hashes(prefix: str) -> dict[str, str]:
    names = ("bin", "idx", "meta.json", "tokenizer.json")
    return {name: hashlib.sha256(Path(f"{prefix}.{name}").read_bytes()).hexdigest() for name in names}
