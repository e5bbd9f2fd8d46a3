"""On what data a run goes on: the same in the same order, or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megapre import checkpoint
from megapre.config import Config
from megapre.data import DataError, tokenize, train_tokenizer
from megapre.train import evaluate, loop
from megapre.train.changes import ResumeError
from megapre.train.settle import settle

Tiny = Callable[..., Config]


@pytest.fixture
def other(tmp_path: Path) -> str:
    """Another text with another tokenizer."""
    (tmp_path / "other.txt").write_text("whales swim past icebergs; lighthouses blink at whales\n" * 200)
    train_tokenizer([tmp_path / "other.txt"], "bpe", 300, tmp_path / "other.json")
    made = tokenize.run(
        [tmp_path / "other.txt"], tmp_path / "other", tmp_path / "other.json", workers=1, progress=False
    )
    return made.prefix


def test_more_steps_within_the_epoch_go_on_and_beyond_it_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    assert loop.run(tiny("run.steps=2")) == 0
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ResumeError, match=r"run\.steps = 2 planned 1 epochs of .*run\.steps = 200 plans [2-9],"):
        loop.run(tiny("run.steps=200"), resume=True)
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert loop.run(tiny("run.steps=3"), resume=True) == 0


def test_moved_data_goes_on_and_other_data_is_refused(tiny: Tiny, corpus: Path, tmp_path: Path, other: str) -> None:
    assert loop.run(tiny("run.steps=2")) == 0
    vocab = "model.vocab=360"
    with pytest.raises(
        ResumeError, match=r"it was trained on .*tiny_text_document \(400 documents.*other_text_document"
    ):
        loop.run(tiny("run.steps=3", "data.split=1,0,0", vocab, f'data.train=["{other}"]'), resume=True)
    shutil.copytree(corpus.parent, tmp_path / "moved")
    assert loop.run(tiny("run.steps=3", f'data.train=["{tmp_path / "moved" / corpus.name}"]'), resume=True) == 0


def test_data_of_another_tokenizer_is_not_evaluated(tiny: Tiny, tmp_path: Path, other: str) -> None:
    assert loop.run(tiny("run.steps=2")) == 0
    with pytest.raises(DataError, match=r"another tokenizer.*sha256 [0-9a-f]{12} and [0-9a-f]{12}"):
        evaluate.run(tmp_path / "run", other, device="cpu")


def test_a_tokenizer_file_that_was_exchanged_is_refused(tiny: Tiny, other: str) -> None:
    Path(f"{other}.tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not the tokenizer that .*other_text_document was made with"):
        settle(tiny(f'data.train=["{other}"]'))


def test_a_checkpoint_counts_as_saved_where_older_ones_stay(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> list[Path]:
        raise PermissionError("not yours")

    monkeypatch.setattr(checkpoint, "retain", fail)
    assert loop.run(tiny("run.steps=2")) == 0
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "could not be removed: not yours" in log and "checkpoint failed" not in log
    assert checkpoint.newest_verified(tmp_path / "run" / "checkpoints") is not None
