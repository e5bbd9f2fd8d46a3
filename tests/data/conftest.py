"""Index builders are tested in both forms, C++ where it is built and NumPy; and what tests of tokenizing share."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from texts import jsonl, write_parquet

from megapre.data import Tokenizer, train_tokenizer
from megapre.data import shards as shards_module
from megapre.data.host import host


@pytest.fixture(params=[True, False], ids=["native", "numpy"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Runs a test with megapre._host and without it; the first form is skipped where it was not built."""
    if request.param and host() is None:
        pytest.skip("megapre._host is not built")
    monkeypatch.setenv("MEGAPRE_NATIVE", "auto" if request.param else "0")
    host.cache_clear()
    yield request.param
    monkeypatch.undo()
    host.cache_clear()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("the cat sat on the mat, the dog on the cat; it's 12 o'clock\n" * 50)
    return train_tokenizer([folder / "text.txt"], "bpe", 280, folder / "tokenizer.json")


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several files that make a dozen shards."""
    monkeypatch.setattr(shards_module, "SMALLEST", 2000)
    folder = tmp_path / "in"
    folder.mkdir()
    random = np.random.default_rng(1)
    words = ["the", "cat", "sat", "on", "mat", "dog", "it's", "o'clock", "naïve"]
    texts = [" ".join(random.choice(words, random.integers(0, 60))) for _ in range(100)]
    (folder / "a.jsonl").write_bytes(jsonl(texts[:60]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts[60:80])))
    write_parquet(folder / "c.parquet", list(texts[80:90]), rows=3)
    for i, text in enumerate(texts[90:]):
        (folder / f"d{i}.txt").write_text(text or "x", encoding="utf-8")
    return folder
