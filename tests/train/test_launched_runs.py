"""Whole runs on several processes: what a launcher, a signal or a murderer does to them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megapre import checkpoint
from megapre.train.folder import read_metrics

Start = Callable[..., "subprocess.Popen[str]"]
ENDLESS = ("run.steps=100000", "optim.schedule=constant", "checkpoint.every=0")
LOCAL = [sys.executable, "-m", "megapre", "launch", "local"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megapre", "train"]


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a launcher on the tiny recipe; kills what is left of it."""
    started = []

    def begin(command: list[str], *overrides: str, then: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        fixed = [f'data.train=["{corpus}"]', "data.split=8,2,0", f"run.dir={tmp_path}", "name=run", "run.steps=12"]
        fast = ["run.eval_every=0", "batch.global=4", "batch.micro=1", "run.device=cpu", "run.tensorboard=false"]
        process = subprocess.Popen(
            [*command, "debug", *fixed, *fast, *overrides, *then],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        for pid in [*ranks_of(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that a launcher has started, in their order."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def wait_for(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the run ended without {text!r}: {process.stderr.read() if process.stderr else ''}")


def gone(pids: list[int]) -> bool:
    """Whether none of the processes is left, given a moment."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_one_signal_stops_all_ranks_once_and_saves(start: Start, tmp_path: Path) -> None:
    process = start(LOCAL, *ENDLESS, "layout.pp=2", "layout.tp=2")
    wait_for(process, "[0] step      3/")
    ranks = ranks_of(process)
    assert len(ranks) == 4
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert out.count("stopped by SIGTERM after step") == 1 and "Traceback" not in out + err
    steps = [record["step"] for record in read_metrics(tmp_path / "run")]
    manifest = checkpoint.newest_verified(tmp_path / "run" / "checkpoints")
    assert manifest is not None and manifest.step == steps[-1] and steps == list(range(1, len(steps) + 1))
    assert gone(ranks)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_run(start: Start, tmp_path: Path, victim: int) -> None:
    process = start(LOCAL, *ENDLESS, "layout.dp=2", "checkpoint.every=2")
    wait_for(process, "[0] saved")
    ranks = ranks_of(process)
    os.kill(ranks[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert f"rank {victim} was killed by SIGKILL" in err
    assert gone(ranks)
    assert checkpoint.newest_verified(tmp_path / "run" / "checkpoints") is not None  # and the folder is free again
    again = start(LOCAL, "layout.pp=2", "run.steps=100000", then=("--resume",))
    wait_for(again, "[0] going on from")
    again.terminate()
    again.communicate(timeout=60)


def test_torchrun(start: Start, tmp_path: Path) -> None:
    process = start(TORCHRUN, "layout.tp=2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("layout.tp=4",), "a world of 2 ranks cannot be cut into replicas of tp*pp*cp = 4*1*1 = 4 ranks"),
        (("layout.dp=4",), "= 4 ranks, but there are 2"),
    ],
)
def test_a_wrong_number_of_ranks(start: Start, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    process = start(TORCHRUN, *overrides)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and message in out + err
    assert not (tmp_path / "run").exists()


def test_an_error_on_one_rank_ends_all_and_is_the_one_that_is_told(start: Start, corpus: Path, tmp_path: Path) -> None:
    """A single token that the model does not know: one replica meets it, the other waits for that one's gradients."""
    for ending in ("bin", "idx", "meta.json"):
        shutil.copy(f"{corpus}.{ending}", tmp_path / f"spoiled.{ending}")
    shutil.copy(corpus.parent / "tokenizer.json", tmp_path)
    tokens = np.memmap(tmp_path / "spoiled.bin", np.uint16, "r+")
    tokens[len(tokens) // 3] = 60000
    tokens.flush()
    process = start(LOCAL, *ENDLESS, "layout.dp=2", f'data.train=["{tmp_path}/spoiled"]', "checkpoint.every=1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: the data holds token 60000, the model knows 0 .. 359" in err.splitlines()[-1]
    assert "step_00000001" in out and "Traceback" not in out + err
    assert checkpoint.newest_verified(tmp_path / "run" / "checkpoints") is not None
