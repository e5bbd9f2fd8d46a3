"""Whole runs: what they leave behind, that they resume bit for bit, and how they meet trouble."""

import hashlib
import json
import math
import os
import random
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megapre import checkpoint
from megapre.checkpoint import commit
from megapre.config import Config, load
from megapre.train import loop, report
from megapre.train.changes import ResumeError
from megapre.train.folder import read_metrics
from megapre.train.step import Engine, StepResult

Tiny = Callable[..., Config]


def final_hash(run: Path) -> str:
    """SHA-256 over every tensor of the newest checkpoint: parameters, master weights, moments, generators."""
    manifest = checkpoint.newest_verified(run / "checkpoints")
    assert manifest is not None
    with commit._torch_checkpoint() as (dcp, _):
        reader = dcp.FileSystemReader(manifest.path)
        sizes = reader.read_metadata().state_dict_metadata
        tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in sizes.items()}
    checkpoint.load(manifest, tensors)
    digest = hashlib.sha256(json.dumps(manifest.facts, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    """Everything of the steps that must repeat; times do not."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in read_metrics(run) if "loss" in r]


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, what: Callable[[], None]) -> None:
    """Calls `what` within the at-th step of the next run."""
    step, count = Engine.step, 0

    def counting(self: Engine, *args: object, **options: object) -> StepResult:
        nonlocal count
        count += 1
        if count == at:
            what()
        return step(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "step", counting)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_leaves_a_run_folder(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = tiny("run.eval_every=5", "run.eval_batches=2", "run.tensorboard=true", "checkpoint.every=4")
    assert loop.run(cfg) == 0
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert names >= {"config.toml", "plan.json", "summary.json", "metrics.jsonl", "tokenizer.json", "loss.png"}
    assert [p.name for p in commit.committed(run / "checkpoints")] == [f"step_{s:08d}" for s in (12, 8, 4)]
    assert list((run / "tensorboard").iterdir())
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    records = read_metrics(run)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["consumed_samples"] for r in steps] == list(range(4, 49, 4))
    assert all(r["consumed_tokens"] == 64 * r["consumed_samples"] for r in steps)
    keys = ["step", "consumed_samples", "consumed_tokens", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s"]
    assert list(steps[0]) == [*keys, "mfu", "memory_bytes", "skipped_steps"]
    assert all(r["tokens_per_s"] == pytest.approx(256 / r["step_time_s"]) for r in steps)
    assert [r["step"] for r in records if "valid_loss" in r] == [5, 10, 12]
    vocab = tomllib.loads((run / "config.toml").read_text())["model"]["vocab"]
    assert abs(steps[0]["loss"] - math.log(vocab)) < 0.1
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3

    out = capfd.readouterr().out
    assert out == (run / "logs" / "rank0.log").read_text(), "the log holds what was printed"
    assert "step  1/12 | loss 5.9" in out and "\x1b" not in out, "plain lines into a pipe"


def test_the_config_of_the_run_folder_alone_reproduces_the_run(tiny: Tiny, tmp_path: Path) -> None:
    assert loop.run(tiny()) == 0
    assert loop.run(load(str(tmp_path / "run" / "config.toml"), ["name=again"])) == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "again")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("run.dtype=bf16", "optim.schedule=wsd", "optim.decay_steps=5", "data.prefetch=0"),
        ("model.family=gpt2", "data.document_mask=true", "data.reset_positions=true", "run.log_every=5"),
    ],
    ids=["llama-fp32", "llama-bf16", "gpt2-masked"],
)
def test_resume_is_bitwise_from_any_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    steps = random.Random(str(overrides)).sample(range(1, 12), 2)
    assert loop.run(tiny("name=whole", *overrides)) == 0
    for at in steps:
        cfg = tiny(f"name=cut{at}", *overrides)
        with monkeypatch.context() as patch:
            interrupt(patch, at, terminate)
            assert loop.run(cfg) == 75
        run = tmp_path / f"cut{at}"
        assert [r["step"] for r in read_metrics(run)] == list(range(1, at + 1)), "the step under way was finished"
        torch.manual_seed(at)  # resume must not depend on what the process did before
        assert loop.run(cfg, resume=True) == 0
        assert curve(run) == curve(tmp_path / "whole")
        assert final_hash(run) == final_hash(tmp_path / "whole")


def test_resume_from_an_older_checkpoint_doubles_no_step(tiny: Tiny, tmp_path: Path) -> None:
    """The newest checkpoint is damaged and the process died long after the one before: later records are cut off."""
    cfg = tiny("checkpoint.every=5", "run.eval_every=6", "run.eval_batches=1")
    assert loop.run(cfg) == 0
    run = tmp_path / "run"
    whole, whole_hash, records = curve(run), final_hash(run), len(read_metrics(run))
    damaged = run / "checkpoints" / "step_00000012" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # torn by the kill
    assert loop.run(cfg, resume=True) == 0
    assert curve(run) == whole and final_hash(run) == whole_hash
    assert len(read_metrics(run)) == records
    log = (run / "logs" / "rank0.log").read_text()
    assert "step_00000012/__0_0.distcp" in log and "going on from" in log


def test_resume_of_a_finished_run_does_nothing_and_of_a_new_one_begins_it(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loop.run(tiny("run.steps=2"), resume=True) == 0
    run = tmp_path / "run"

    def files() -> dict[Path, tuple[int, bytes]]:
        found = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "logs"]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found if path.name != ".lock"}

    before = files()
    assert {"summary.json", "plan.json", "metrics.jsonl", "loss.png"} <= {path.name for path in before}
    capsys.readouterr()
    for changed in ("run.log_every=7", "data.seed=7"):  # of an order, no sample is left
        assert loop.run(tiny("run.steps=2", changed), resume=True) == 0
        said = "nothing to do: the run is at step 2 of 2; a larger run.steps goes on\n"
        assert capsys.readouterr().out == said and files() == before
    (run / "summary.json").unlink()
    assert loop.run(tiny("run.steps=2"), resume=True) == 0
    assert (run / "summary.json").is_file(), "a run that was stopped after its last step is still summed up"


def test_resume_with_more_steps_goes_on_and_keeps_the_old_config(tiny: Tiny, tmp_path: Path) -> None:
    assert loop.run(tiny("optim.schedule=constant")) == 0
    assert loop.run(tiny("optim.schedule=constant", "run.steps=15"), resume=True) == 0
    run = tmp_path / "run"
    assert [step for step, *_ in curve(run)] == list(range(1, 16))
    assert tomllib.loads((run / "config.1.toml").read_text())["run"]["steps"] == 12
    assert "run.steps 12 -> 15" in (run / "logs" / "rank0.log").read_text()


@pytest.mark.parametrize("change", ["model.layers=1", "run.dtype=bf16", "batch.global=8"])
def test_resume_as_something_else_is_refused(tiny: Tiny, tmp_path: Path, change: str) -> None:
    assert loop.run(tiny("run.steps=2")) == 0
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ResumeError, match=change.split("=")[0]):
        loop.run(tiny("run.steps=3", change), resume=True)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_log_every_prints_less_and_records_everything(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert loop.run(tiny("name=each")) == 0
    capfd.readouterr()
    assert loop.run(tiny("name=fifth", "run.log_every=5")) == 0
    assert curve(tmp_path / "each") == curve(tmp_path / "fifth")
    out = capfd.readouterr().out
    printed = [line.split("|")[0].split()[1] for line in out.splitlines() if line.startswith("step ")]
    assert printed == ["1/12", "5/12", "10/12", "12/12"], "the first shows that it runs"


def poison(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    step, count = Engine.step, 0

    def poisoned(self: Engine, *args: object, **options: object) -> StepResult:
        nonlocal count
        count += 1
        loss = self.stages[0].run
        if count in steps:
            self.stages[0].run = lambda *inputs: loss(*inputs[:-1]) * math.nan  # without the promised upstream gradient
        result = step(self, *args, **options)  # type: ignore[arg-type]
        self.stages[0].run = loss
        return result

    monkeypatch.setattr(Engine, "step", poisoned)


def test_a_few_bad_steps_are_skipped_counted_and_told(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, range(4, 7))
    assert loop.run(tiny("run.log_every=2")) == 0
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["loss"] is None] == [4, 5, 6]
    assert [r["skipped_steps"] for r in records] == [0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert "step 5: loss nan, gradient norm nan: update skipped, 2 so far; 2 in a row" in capfd.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 3


def test_a_run_that_has_diverged_stops_and_saves_no_nan(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, range(6, 100))
    assert loop.run(tiny("checkpoint.every=4")) == 1
    assert "not finite in 5 steps in a row, 6 to 10" in capfd.readouterr().out
    assert [r["step"] for r in read_metrics(tmp_path / "run")][-1] == 5 + report.SKIPS_IN_ROW
    manifest = checkpoint.newest_verified(tmp_path / "run" / "checkpoints")
    assert manifest is not None and manifest.step == 10
    weight = torch.zeros(360, 64)
    checkpoint.load(manifest, {"model.embed.weight": weight})
    assert weight.isfinite().all() and weight.any()


def test_a_save_that_fails_is_reported_and_training_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fsync, full = os.fsync, True

    def no_space(descriptor: int) -> None:
        if full:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    def free() -> None:
        nonlocal full
        full = False

    monkeypatch.setattr(os, "fsync", no_space)
    interrupt(monkeypatch, 9, free)
    assert loop.run(tiny("checkpoint.every=4")) == 0
    out = capfd.readouterr().out
    assert out.count("checkpoint failed, training goes on") == 2 and "No space left" in out
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000012"]


def test_a_last_save_that_fails_is_not_success(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    assert loop.run(tiny("run.steps=2")) == 1
    assert "No space left" in capfd.readouterr().out


def test_a_resume_of_no_run_is_told_below_the_box(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert loop.run(tiny("run.steps=2"), resume=True) == 0
    lines = capsys.readouterr().out.splitlines()
    told = next(i for i, line in enumerate(lines) if line.startswith("--resume: ") and "no checkpoint yet" in line)
    assert lines[told - 1].startswith("╰") and lines[told + 1].startswith("step 1/2")
    assert loop.run(tiny("run.steps=3"), resume=True) == 0
    assert "no checkpoint yet" not in capsys.readouterr().out
