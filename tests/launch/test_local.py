"""`megapre launch local`: what it starts, what it refuses beforehand, what it leaves."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from megapre.config import load, to_toml
from megapre.data import DataError, IndexedWriter
from megapre.launch import local
from megapre.mesh import Mesh, MeshError
from megapre.schedule import ScheduleError
from megapre.train import cpu_runtime
from megapre.train.changes import ResumeError
from megapre.train.folder import RunFolderError

OVERRIDES = ("layout.tp=2", "layout.pp=2", "name=x", "run.dir=somewhere")


DATA = ("data.train=text", "model.vocab=300")


def write_data(folder: Path) -> None:
    with IndexedWriter(folder / "text", vocab_size=300) as writer:
        writer.add_document(range(300))


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "object":
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    stand_in = create_autospec(local.launch, return_value=75)
    monkeypatch.setattr(local, "launch", stand_in)
    monkeypatch.setattr(cpu_runtime, "look", lambda: cpu_runtime.Cpus(16, 8, None))
    for variable in (*cpu_runtime.THREADS, *cpu_runtime.PINNING):
        monkeypatch.delenv(variable, raising=False)
    return stand_in


def called(launch: "object", *overrides: str, **options: object) -> tuple[list[str], int, Path, float, dict[str, str]]:
    assert local.run(load("debug", [*DATA, *overrides]), "debug", overrides, **options) == 75  # type: ignore[arg-type]
    return launch.call_args.args  # type: ignore[attr-defined]


def test_every_rank_runs_the_training_of_the_recipe(launch: "object") -> None:
    command, nproc, logs, grace, environment = called(launch, *OVERRIDES, resume=True, grace=7.0)
    assert command == [sys.executable, "-m", "megapre", "train", "debug", *OVERRIDES, "--resume"]
    assert (nproc, logs, grace) == (4, Path("somewhere/x/logs"), 7.0)  # as many as the layout needs
    assert environment["PYTHONUNBUFFERED"] == "1" and environment["OMP_NUM_THREADS"] == "2"
    assert "--resume" not in called(launch, *OVERRIDES, nproc=8)[0]
    assert called(launch, *OVERRIDES, nproc=8)[1] == 8
    assert called(launch, "layout.dp=2", "layout.tp=2")[1] == 4


def test_who_has_chosen_threads_keeps_them(launch: "object", monkeypatch: pytest.MonkeyPatch) -> None:
    assert "OMP_NUM_THREADS" not in called(launch, *OVERRIDES, "run.threads=3")[4]
    assert "OMP_NUM_THREADS" not in called(launch)[4]  # one rank has them all
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert called(launch, *OVERRIDES)[4]["OMP_NUM_THREADS"] == "5"


def test_what_does_not_fit_is_told_before_anything_starts(launch: "object") -> None:
    with pytest.raises(MeshError, match="a world of 6 ranks cannot be cut"):
        called(launch, *OVERRIDES, nproc=6)
    with pytest.raises(
        MeshError, match=r"tp\*pp\*cp\*dp = 2\*1\*1\*2 = 4 ranks, but there are 8; nearest: 4 ranks, dp 4"
    ):
        called(launch, "layout.tp=2", "layout.dp=2", nproc=8)
    with pytest.raises(ValueError, match="batch: global = 4 sequences cannot be cut"):
        called(launch, "batch.global=4", "batch.micro=1", nproc=3)
    with pytest.raises(DataError, match=r"nowhere.idx does not exist"):
        called(launch, "data.train=nowhere")
    Path("mine.txt").write_text("chunks: 1\nmicro-batches: 4\nrank 0: F0.0\nrank 1: F0.0\n")
    with pytest.raises(ScheduleError, match="schedule 'mine' cannot run"):
        called(launch, "layout.pp=2", "layout.schedule=mine.txt")
    assert not Path("runs").exists()
    launch.assert_not_called()  # type: ignore[attr-defined]


def test_a_run_that_is_there_is_told_before_anything_starts(launch: "object", tmp_path: Path) -> None:
    here = ("layout.tp=2", "name=x", f"run.dir={tmp_path}")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.toml").write_text(to_toml(load("debug", [*DATA, *here])))
    with pytest.raises(RunFolderError, match="exists already; continue that run with --resume"):
        called(launch, *here)
    with pytest.raises(ResumeError, match=r"cannot go on with model.layers 2 -> 4"):
        called(launch, *here, "model.layers=4", resume=True)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["config.toml"]
    (tmp_path / "x" / "checkpoints" / "step_00000003").mkdir(parents=True)
    with pytest.raises(ResumeError, match=r"data.seed 1234 -> 7\. Resume it"):
        called(launch, *here, "data.seed=7", resume=True)
    launch.assert_not_called()  # type: ignore[attr-defined]
    assert called(launch, *here, resume=True)[2] == tmp_path / "x" / "logs"
    (tmp_path / "x" / "summary.json").write_text('{"steps": 3}')
    called(launch, *here, "data.seed=7", "run.steps=3", "optim.warmup_steps=0", resume=True)  # no sample is left
    command, *_ = called(launch, *here, "data.seed=7", resume=True, reorder=True)
    assert command[-2:] == ["--resume", "--reorder-data"]


def test_a_run_that_was_cut_off_is_told_its_way_on(launch: "object", capsys: pytest.CaptureFixture[str]) -> None:
    launch.return_value = 137  # type: ignore[attr-defined]
    run = Path("runs/x")
    said = []
    for made in (run, run / "checkpoints/step_00000100", run / "checkpoints/step_100000000"):
        made.mkdir(parents=True)
        (run / "config.toml").write_text(to_toml(load("debug", [*DATA, "name=x"])))
        assert local.run(load("debug", [*DATA, "name=x"]), "debug", ["name=x"], resume=True) == 137
        said.append(capsys.readouterr().err)
    assert said[0] == "megapre: no checkpoint was saved: --resume begins runs/x anew\n"
    assert [text.split()[-1] for text in said[1:]] == ["step_00000100", "step_100000000"]
    for code in (0, 2, 75, 130):
        launch.return_value = code  # type: ignore[attr-defined]
        local.run(load("debug", [*DATA, "name=y"]), "debug", ["name=y"])
    assert capsys.readouterr().err == ""


def test_a_mesh_of_a_layout() -> None:
    assert Mesh.of(load("debug", OVERRIDES).layout, 8) == Mesh(8, tp=2, pp=2)


def test_a_run_that_cannot_begin_leaves_the_logs_alone_and_may_be_begun_again(tmp_path: Path) -> None:
    write_data(tmp_path)
    runs = tmp_path / "runs"
    begin = [sys.executable, "-m", "megapre", "launch", "local", "debug", "run.dir=runs", "name=r", *DATA]
    for attempt in (1, 2):
        done = subprocess.run(
            [*begin, "kernels.rms_norm=magic"], capture_output=True, text=True, cwd=tmp_path, timeout=200
        )
        assert done.returncode == 2
        last = done.stderr.splitlines()
        assert last[0].startswith("megapre: rank 0 ended with exit code 2; its last lines, all of them in")
        assert last[-1].startswith("megapre: error: ") and "magic" in last[-1]
        assert {str(path.relative_to(runs)) for path in runs.rglob("*")} == {"r", "r/logs", "r/logs/rank0.out"}
        assert (runs / "r/logs/rank0.out").read_text().count("megapre: error: ") == attempt
