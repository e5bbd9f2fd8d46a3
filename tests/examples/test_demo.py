"""The demo through the real commands, at a tiny size: it runs, it can be stopped anywhere and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "examples" / "demo" / "corpus"
TINY = ("model.layers=1", "model.hidden=32", "model.heads=2", "model.kv_heads=2", "model.ffn=64", "batch.micro=2",
        "batch.global=4", "batch.seq_length=32", "optim.warmup_steps=2", "run.eval_every=4", "run.eval_batches=1",
        "run.dtype=fp32", "run.tensorboard=false")  # fmt: skip


def demo(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "demo" / "run.py"
    return subprocess.run(
        [sys.executable, script, *TINY, *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder like the root of the repository, with little text in it."""
    for part in ("train", "valid"):
        (tmp_path / "examples/demo/corpus" / part).mkdir(parents=True)
    (tmp_path / "examples/demo/corpus/train/austen.jsonl.zst").symlink_to(CORPUS / "valid/austen.jsonl.zst")
    (tmp_path / "examples/demo/corpus/valid/austen.jsonl.zst").symlink_to(CORPUS / "valid/apache.jsonl.zst")
    return tmp_path


def test_demo_runs_and_a_second_one_keeps_what_exists(small: Path) -> None:
    first = demo(small, "run.steps=8")
    assert first.returncode == 0, first.stdout + first.stderr
    for command in ("tokenizer train", "tokenize", "train demo", "eval runs/demo", "sample runs/demo"):
        assert f"megapre {command}" in first.stdout
    for line in ("The loss fell from 8.", "From text to samples: ", "loss plot   runs/demo/loss.png", "Try next:"):
        assert line in first.stdout
    run = small / "runs/demo"
    assert (run / "loss.png").stat().st_size > 10_000
    metrics = (run / "metrics.jsonl").read_bytes()
    losses = [record["loss"] for record in map(json.loads, metrics.splitlines()) if "loss" in record]
    assert len(losses) == 8

    second = demo(small, "run.steps=8")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "tokenizer.json exists and is kept" in second.stdout
    assert "runs/demo holds a finished run and is kept" in second.stdout
    assert "From text to samples" not in second.stdout
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_demo_goes_on_with_a_run_that_was_stopped(small: Path) -> None:
    assert demo(small, "run.steps=4").returncode == 0
    (small / "runs/demo/summary.json").unlink()  # as a stopped run leaves it: checkpoints, and no summary
    again = demo(small, "run.steps=8")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "--resume" in again.stdout
    steps = [json.loads(line)["step"] for line in (small / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 9))


def test_ctrl_c_lets_the_training_save(small: Path) -> None:
    script = ROOT / "examples" / "demo" / "run.py"
    running = subprocess.Popen(
        [sys.executable, "-u", script, *TINY, "run.steps=100000", "run.log_every=1"],
        cwd=small, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step "):
            break
    os.killpg(running.pid, signal.SIGINT)  # a terminal sends it to the whole group
    rest = running.communicate(timeout=60)[0]
    assert running.returncode == 130, rest
    assert "go on with --resume" in rest
    assert "demo: stopped (exit code 130). Run it again to go on" in rest
    assert len(list((small / "runs/demo/checkpoints").glob("step_*"))) == 1


def test_demo_stops_at_a_failing_command_with_its_exit_code(small: Path) -> None:
    failed = demo(small, "run.steps=8", "model.heads=3")
    assert failed.returncode == 2
    assert "hidden" in failed.stderr
    assert "Run it again to go on" in failed.stdout
    assert not (small / "runs/demo").exists()


def test_demo_outside_the_repository_says_where_it_belongs(tmp_path: Path) -> None:
    lost = demo(tmp_path)
    assert lost.returncode == 2
    assert "root of the repository" in lost.stderr
    assert list(tmp_path.iterdir()) == []
