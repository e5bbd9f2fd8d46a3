"""A run by a schedule that the user wrote: reproduced and resumed from its folder alone, changes noticed."""

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from ranks import RunOn
from test_train_on_ranks import train

from megapre.config import Config, load
from megapre.schedule import build, read, write
from megapre.schedule.files import as_text
from megapre.train import loop
from megapre.train.folder import open_run, read_metrics

Tiny = Callable[..., Config]
MICRO = ("batch.micro=1", "run.steps=3")
ONE_BY_ONE = "chunks: 1\nmicro-batches: 4\nrank 0: F0.0 B0.0 F1.0 B1.0 F2.0 B2.0 F3.0 B3.0\n"
FORWARDS_FIRST = "chunks: 1\nmicro-batches: 4\nrank 0: F0.0 F1.0 F2.0 F3.0 B0.0 B1.0 B2.0 B3.0\n"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, in the folder in which the run is started."""
    there = tmp_path / "work"
    there.mkdir()
    monkeypatch.chdir(there)
    (there / "mine.txt").write_text(ONE_BY_ONE)
    return there / "mine.txt"


def copies(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("schedule-*.txt"))


def said(run: Path) -> str:
    lines = (run / "logs" / "rank0.log").read_text().splitlines()
    return "".join(line for line in lines if line.startswith("resuming with changes"))


def test_the_run_folder_alone_reproduces_the_run_from_anywhere(
    tiny: Tiny, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO)) == 0
    (copy,) = copies(tmp_path / "run")
    assert (tmp_path / "run" / copy).read_bytes() == mine.read_bytes()
    mine.unlink()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "moved")
    recipe = tmp_path / "elsewhere" / "moved" / "config.toml"
    assert loop.run(load(str(recipe), ["name=again"])) == 0
    curves = [[(r["step"], r["loss"]) for r in read_metrics(tmp_path / name)] for name in ("run", "again")]
    assert curves[0] == curves[1] and len(curves[0]) == 3
    assert copies(tmp_path / "again") == [copy]
    assert loop.run(load(str(tmp_path / "run" / "config.toml"), ["run.steps=4"]), resume=True) == 0
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert "layout.schedule" not in said(tmp_path / "run")


def test_a_file_changed_before_a_resume_is_told_and_both_are_kept(tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO)) == 0
    mine.write_text(f"# the same table\n{ONE_BY_ONE}")
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO, "run.steps=4"), resume=True) == 0
    assert "run.steps 3 -> 4" in said(run) and "layout.schedule" not in said(run)
    mine.write_text(FORWARDS_FIRST)
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO, "run.steps=5"), resume=True) == 0
    assert "-> mine.txt (6 of 8 actions differ)" in said(run)
    assert len(copies(run)) == 3  # of the texts, each named by the config of its time
    found = [read(load(str(run / f"config{n}.toml")).layout.schedule).programs for n in (".1", ".2", "")]
    assert found[0] == found[1] != found[2] == read(mine).programs


def test_a_copy_that_was_edited_is_told(tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO)) == 0
    (copy,) = copies(run)
    (run / copy).write_text(FORWARDS_FIRST)
    assert loop.run(load(str(run / "config.toml"), ["run.steps=4"]), resume=True) == 0
    old, new = copy.removeprefix("schedule-").removesuffix(".txt"), sha256(FORWARDS_FIRST.encode()).hexdigest()[:8]
    assert f"(the copy in the run folder was edited: sha256 {old} -> {new})" in said(run)
    assert set(copies(run)) == {copy, f"schedule-{new}.txt"}
    assert Path(open_run(run).layout.schedule).name == f"schedule-{new}.txt"


def test_a_copy_that_is_gone_and_a_schedule_with_a_name_are_told(tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO)) == 0
    (run / copies(run)[0]).unlink()
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO, "run.steps=4"), resume=True) == 0
    assert "-> mine.txt (the copy in the run folder cannot be compared: " in said(run) and "No such file" in said(run)
    assert loop.run(tiny(*MICRO, "run.steps=5"), resume=True) == 0
    assert f"{copies(run)[0]} -> 1f1b" in said(run)


def test_a_run_of_before_there_were_copies_goes_on(tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO)) == 0
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(copies(run)[0], "mine.txt"))
    (run / copies(run)[0]).unlink()
    assert loop.run(tiny("layout.schedule=mine.txt", *MICRO, "run.steps=4"), resume=True) == 0
    assert "run.steps 3 -> 4" in said(run) and "layout.schedule" not in said(run)
    assert len(copies(run)) == 1


def test_ranks_go_on_by_the_copy(run_on: RunOn, tiny: Tiny, mine: Path, tmp_path: Path) -> None:
    table = build("gpipe", ranks=2, chunks=1, micro_batches=4)
    write(table, mine)
    layout = ("layout.pp=2", f"layout.schedule={mine}", *MICRO)
    assert run_on(2, train, tiny(*layout)) == [0, 0]
    mine.unlink()
    (copy,) = copies(tmp_path / "run")
    assert (tmp_path / "run" / copy).read_text() == as_text(table)
    again = load(str(tmp_path / "run" / "config.toml"), ["run.steps=4"])
    assert run_on(2, train, again, True) == [0, 0]


def test_a_recipes_schedule_lies_beside_it_or_where_the_command_runs(mine: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = '[model]\nfamily = "gpt2"\nlayers = 2\nhidden = 8\nheads = 2\ncontext = 8\n[batch]\nglobal = 4\n'
    recipe.write_text(f'{text}seq_length = 8\n[optim]\nlr = 1e-3\n[run]\nsteps = 1\n[layout]\nschedule = "mine.txt"\n')
    assert load(str(recipe)).layout.schedule == "mine.txt"
    shutil.copy(mine, tmp_path)
    assert load(str(recipe)).layout.schedule == str(tmp_path / "mine.txt")
    assert load(str(recipe), ["layout.schedule=other.txt"]).layout.schedule == "other.txt"
    assert load(str(recipe), ["layout.schedule=gpipe"]).layout.schedule == "gpipe"
