"""Ctrl-C, SIGTERM and kill -9 against real processes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megapre import checkpoint
from megapre.config import Config, to_toml
from megapre.train import machine
from megapre.train.folder import read_metrics
from megapre.train.signals import StopRequest, Vote

Tiny = Callable[..., Config]
ENDLESS = ("run.steps=100000", "optim.schedule=constant", "checkpoint.every=0")


def start(recipe: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "megapre", "train", str(recipe), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def wait_for(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(text):
            return
    pytest.fail(f"the run ended without {text!r}: {process.stderr.read() if process.stderr else ''}")


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    def write(*overrides: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(to_toml(tiny(*overrides)))
        return path

    return write


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR2, 75)])
def test_the_first_signal_finishes_the_step_saves_and_exits(
    recipe: Callable[..., Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(recipe(*ENDLESS))
    wait_for(process, "step      3/")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{number.name}: finishing the step" in err and "Traceback" not in err
    assert f"stopped by {number.name}" in out
    manifest = checkpoint.newest_verified(tmp_path / "run" / "checkpoints")
    assert manifest is not None and manifest.step == read_metrics(tmp_path / "run")[-1]["step"] >= 3


def test_a_launched_run_saves_and_resumes(recipe: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megapre", "launch", "local", str(recipe(*ENDLESS))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, "[0] step      3/")
    process.send_signal(signal.SIGHUP)  # the terminal is closed
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "[0] stopped by SIGTERM after step" in out
    assert "SIGHUP: passed on to all ranks" in err and "Traceback" not in err
    manifest = checkpoint.newest_verified(tmp_path / "run" / "checkpoints")
    assert manifest is not None and manifest.step >= 3
    logs = tmp_path / "run" / "logs"
    assert {line for line in (logs / "rank0.log").read_text().splitlines() if line.startswith("step")} <= set(
        (logs / "rank0.out").read_text().splitlines()
    )
    process = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, f"[0] step {manifest.step + 1:6}/")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_second_signal_ends_the_process_at_once(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The step under way takes minutes, so whatever ends the process in seconds did not wait for it."""
    process = start(recipe("run.steps=2", "batch.global=40000"))
    wait_for(process, "╰")  # the box is out: training begins
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "once more" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert checkpoint.newest_verified(tmp_path / "run" / "checkpoints") is None


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(recipe: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe("run.steps=40", "checkpoint.every=3", "checkpoint.keep=2")
    assert start(file, "name=whole").wait(timeout=120) == 0
    chance = random.Random(1)
    kills = 0
    for _ in range(20):
        process = start(file, "name=killed", "--resume")
        assert process.stdout is not None
        if kills < 2:
            wait_for(process, "step")
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
        process.communicate(timeout=120)
        if process.returncode == 0:
            break
        kills += process.returncode == -signal.SIGKILL
    assert process.returncode == 0 and kills == 2
    curves = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name)] for name in ("whole", "killed")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 40
    tensors = [
        (tmp_path / n / "checkpoints" / "step_00000040" / "__0_0.distcp").read_bytes() for n in ("whole", "killed")
    ]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(("kind", "steps"), [("cpu", 3), ("cuda", 4)])
def test_ranks_stop_after_the_first_step_that_begins_with_one_asked_or_on_cuda_the_next(
    kind: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the number begins to travel with its step: asked for a step later, it would come after that one too."""
    done: list[tuple[str, int]] = []

    class Told:
        """How many ranks were asked before a step, from a device that need not be here."""

        def __init__(self, stops: SimpleNamespace) -> None:
            self.number = stops.number
            done.append(("sent", self.number))

        def read(self) -> list[int]:
            done.append(("read", self.number))
            return [self.number]

    monkeypatch.setattr(machine, "Told", Told)
    vote, told = Vote(StopRequest(), world=2), [0, 0, 1, 2, 2]
    stops = [SimpleNamespace(number=number, device=SimpleNamespace(type=kind)) for number in told]
    made = next(step for step, one in enumerate(stops, 1) if vote.passed(one))  # type: ignore[arg-type]
    assert made == steps and vote.signal == signal.SIGTERM
    late = int(kind == "cuda")
    sent, read = ([number for what, number in done if what == kind_of] for kind_of in ("sent", "read"))
    assert sent == told[:made] and read == told[: made - late]


def test_numbers_are_told_as_they_are() -> None:
    assert machine.Told(torch.tensor([1.5, float("inf")])).read() == [1.5, float("inf")]
    assert machine.Told(torch.tensor(2.0)).read() == [2.0]
