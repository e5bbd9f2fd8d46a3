"""A run folder that was moved: its config.toml begins no second run at the old place."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megapre.config import Config, load
from megapre.launch import local
from megapre.train import loop
from megapre.train.folder import RunFolderError, read_metrics
from megapre.train.moved import refuse_moved

Tiny = Callable[..., Config]
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def moved(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The config.toml of a run of two steps, moved from runs/pp to moved/pp2."""
    monkeypatch.chdir(tmp_path)
    assert loop.run(tiny("run.dir=runs", "name=pp", "run.steps=2")) == 0
    Path("moved").mkdir()
    shutil.move("runs/pp", "moved/pp2")
    return "moved/pp2/config.toml"


SAID = r"of the run in moved/pp2, but .* would be in runs/pp: .* add run.dir=moved name=pp2;"


@pytest.mark.parametrize("half", [(), ("name=pp2",), ("run.dir=moved",)], ids=["none", "name", "dir"])
def test_a_moved_run_is_refused_until_its_place_is_named(moved: str, half: tuple[str, ...]) -> None:
    with pytest.raises(RunFolderError, match=SAID if not half else "add run.dir=moved name=pp2;"):
        refuse_moved(moved, load(moved, half), half)
    whole = ("run.dir=moved", "name=pp2", "run.steps=3")
    refuse_moved(moved, load(moved, whole), whole)
    assert loop.run(load(moved, whole), resume=True) == 0
    assert [record["step"] for record in read_metrics(Path("moved/pp2"))] == [1, 2, 3]


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resume"])
@pytest.mark.parametrize("verb", [["train"], ["launch", "local"]], ids=["train", "launch"])
def test_both_verbs_refuse_before_anything_starts(
    megapre: Command,
    moved: str,
    verb: list[str],
    resume: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "launch", None)
    monkeypatch.setattr(loop, "run", None)
    code, err = megapre(*verb, moved, *resume)
    assert code == 2 and "moved/pp2, but the run that it names would be in runs/pp" in err
    assert not Path("runs/pp").exists()


def test_another_place_can_be_asked_for(moved: str) -> None:
    for asked in (("name=again",), ("run.dir=elsewhere",)):
        refuse_moved(moved, load(moved, asked), asked)
    (Path("moved/pp2/config.toml")).rename("moved/pp2/recipe.toml")
    refuse_moved("moved/pp2/recipe.toml", load("moved/pp2/recipe.toml"), ())  # a recipe of the user's


def test_the_folder_is_known_by_any_path(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop.run(tiny("run.steps=2")) == 0
    run = tmp_path / "run"
    (tmp_path / "link").symlink_to(run)
    for recipe in (run / "config.toml", tmp_path / "link" / "config.toml"):
        refuse_moved(str(recipe), load(str(recipe)), ())
    monkeypatch.chdir(run)
    refuse_moved("config.toml", load("config.toml"), ())
    moved = run.rename(tmp_path / "there")
    with pytest.raises(RunFolderError, match=f"add run.dir={tmp_path} name=there;"):
        refuse_moved("config.toml", load("config.toml"), ())
    shutil.rmtree(moved / "checkpoints")
    (moved / "metrics.jsonl").unlink()
    refuse_moved("config.toml", load("config.toml"), ())  # nothing was trained here
