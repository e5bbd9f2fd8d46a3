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
Blend = Callable[[int, int], str]


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
    assert loop.run(tiny("run.steps=200"), resume=True, reorder=True) == 0


@pytest.fixture
def blend(corpus: Path, tmp_path: Path) -> Callable[[int, int], str]:
    """The override for the corpus and a copy of it, blended by weights."""
    shutil.copytree(corpus.parent, tmp_path / "copy")

    def override(first: int, second: int) -> str:
        prefixes = (corpus, first), (tmp_path / "copy" / corpus.name, second)
        tables = [f'{{prefix="{prefix}", weight={weight}}}' for prefix, weight in prefixes]
        return f"data.train=[{', '.join(tables)}]"

    return override


@pytest.mark.parametrize(
    ("after", "weights", "said"),
    [
        ("data.seed=7", (1, 3), r"data\.seed 1234 -> 7\."),
        ("run.seed=7", (1, 3), r"data\.seed 1234 -> 7\."),
        ("data.split=7,3,0", (1, 3), r"data\.split 8,2,0 -> 7,3,0\."),
        ("optim.lr=1e-3", (2, 3), r"weights of the 2 sources 1, 3 -> 2, 3\."),
    ],
)
def test_another_order_is_refused_unless_it_is_asked_for(
    tiny: Tiny, blend: Blend, tmp_path: Path, after: str, weights: tuple[int, int], said: str
) -> None:
    assert loop.run(tiny("run.steps=2", blend(1, 3))) == 0
    kept = sorted((tmp_path / "run").rglob("*"))
    changed = after, blend(*weights)
    with pytest.raises(ResumeError, match=r"has consumed 8 samples in 2 steps and .* other 4 of 12 .*: " + said):
        loop.run(tiny("run.steps=3", *changed), resume=True)
    assert sorted((tmp_path / "run").rglob("*")) == kept
    assert loop.run(tiny("run.steps=3", *changed), resume=True, reorder=True) == 0
    assert "resuming with changes" in (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert loop.run(tiny("run.steps=4", *changed), resume=True) == 0, "it is the run's own order now"


def test_what_leaves_the_order_as_it_was_goes_on(tiny: Tiny, blend: Blend) -> None:
    """The same part of the documents to train on, weights in the same ratio."""
    assert loop.run(tiny("run.steps=2", "data.split=8,2,0", blend(1, 3))) == 0
    assert loop.run(tiny("run.steps=3", "data.split=80,10,10", blend(2, 6)), resume=True) == 0


def test_bounds_of_stages_are_part_of_the_order(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    def stages(first: int, last: int) -> list[str]:
        parts = [f'{{until_tokens={until}, train=["{corpus}"]}}' for until in (first, last)]
        return ["data.train=[]", f"data.stages=[{', '.join(parts)}]"]

    per_step = tiny().batch.tokens
    assert loop.run(tiny("run.steps=2", *stages(per_step, 2 * per_step))) == 0
    assert loop.run(tiny("run.steps=3", *stages(per_step, 0)), resume=True) == 0
    with pytest.raises(ResumeError, match=rf"data\.stages 2 from \[0, {per_step}\] tokens on -> 2 from \[0, "):
        loop.run(tiny("run.steps=4", *stages(2 * per_step, 0)), resume=True)


def test_a_run_without_a_checkpoint_may_still_change_its_order(tiny: Tiny, tmp_path: Path) -> None:
    assert loop.run(tiny("run.steps=2")) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    assert loop.run(tiny("run.steps=2", "data.seed=7"), resume=True) == 0


def test_moved_data_goes_on_and_other_data_is_refused(tiny: Tiny, corpus: Path, tmp_path: Path, other: str) -> None:
    assert loop.run(tiny("run.steps=2", "data.split=1,0,0")) == 0
    vocab = "model.vocab=360"
    with pytest.raises(
        ResumeError, match=r"it was trained on .*tiny_text_document \(400 documents.*other_text_document"
    ):
        loop.run(tiny("run.steps=3", "data.split=1,0,0", vocab, f'data.train=["{other}"]'), resume=True)
    shutil.copytree(corpus.parent, tmp_path / "moved")
    moved = tiny("run.steps=3", "data.split=1,0,0", f'data.train=["{tmp_path / "moved" / corpus.name}"]')
    assert loop.run(moved, resume=True) == 0


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
