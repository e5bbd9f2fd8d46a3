"""Runs that are cut short, whose output goes nowhere, whose disk is full: what is kept and what is said."""

import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megapre import checkpoint
from megapre.config import Config
from megapre.data import load_tokenizer
from megapre.train import bench, end, loop, sample
from megapre.train.folder import RunFolder, RunFolderError, read_metrics
from megapre.train.metrics import Journal
from megapre.train.save import Progress, Saver
from megapre.train.screen import Screen
from megapre.train.step import Engine, StepResult

Tiny = Callable[..., Config]


class Gone(io.StringIO):
    """A pipe whose reader has ended."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, what: Callable[[Engine], None]) -> None:
    """Calls `what` at the beginning of the number-th step of the next run."""
    step, count = Engine.step, 0

    def counting(self: Engine, *args: object, **options: object) -> StepResult:
        nonlocal count
        count += 1
        if count == number:
            what(self)
        return step(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "step", counting)


def terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail(_: Engine) -> None:
    raise RuntimeError("out of memory")


def newest(run: Path) -> int | None:
    manifest = checkpoint.newest_verified(run / "checkpoints")
    return None if manifest is None else manifest.step


def test_stopped_without_room_to_save_is_a_failure_and_says_so(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    at_step(monkeypatch, 3, terminate)
    assert loop.run(tiny()) == 1
    out = capfd.readouterr().out
    assert "after step 3, but that state could not be saved: --resume begins anew" in out and "go on with" not in out


def test_a_signal_in_the_last_step_changes_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 12, terminate)
    assert loop.run(tiny()) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12


@pytest.mark.parametrize("resume", [False, True])
def test_a_signal_before_the_first_step_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    monkeypatch.setattr(loop, "plan_of", lambda *args, plan_of=loop.plan_of: terminate() or plan_of(*args))
    assert loop.run(tiny(), resume) == 75
    assert not (tmp_path / "run").exists()


def test_an_error_within_the_steps_saves_the_last_finished_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loop.run(tiny("name=whole")) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 8, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loop.run(tiny("run.log_every=100"))
    run = tmp_path / "run"
    assert newest(run) == 7
    assert [r["step"] for r in read_metrics(run)] == list(range(1, 8))
    assert loop.run(tiny("run.log_every=100"), resume=True) == 0
    curves = [[(r["step"], r["loss"]) for r in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert curves[0] == curves[1]


def fail_amid_the_update(engine: Engine) -> None:
    """The second of the optimizer's groups fails, after the first has its new weights."""
    update, calls = engine.optimizer.adamw_, 0
    assert len(engine.optimizer.groups) > 1

    def failing(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")
        return update(*args, **options)

    engine.optimizer.adamw_ = failing


@pytest.mark.parametrize(("every", "kept", "resumes"), [(0, None, "begins anew"), (3, 6, "goes back to step 6")])
def test_an_error_amid_an_update_saves_nothing_of_it(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    every: int,
    kept: int | None,
    resumes: str,
) -> None:
    assert loop.run(tiny("name=whole")) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 8, fail_amid_the_update)
        with pytest.raises(RuntimeError, match="out of memory"):
            loop.run(tiny(f"checkpoint.every={every}"))
    out = capfd.readouterr().out
    assert "step 7 is not saved, for the error came amid the update of step 8, and the weights are of both: " in out
    assert f"--resume {resumes}" in out
    assert newest(tmp_path / "run") == kept
    assert loop.run(tiny(f"checkpoint.every={every}"), resume=True) == 0
    curves = [[(r["step"], r["loss"]) for r in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert curves[0] == curves[1]


def fail_after_the_update(engine: Engine) -> None:
    """What comes last in a step fails: the state is all of the next step, but that is not counted yet."""
    step = engine._on_device

    def failing(*args: object) -> StepResult:
        step(*args)  # type: ignore[arg-type]
        raise RuntimeError("out of memory")

    engine._on_device = failing  # type: ignore[method-assign, assignment]


def test_a_step_that_is_not_counted_is_not_saved_as_the_one_before(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 8, fail_after_the_update)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.run(tiny("checkpoint.every=5"))
    assert newest(tmp_path / "run") == 5


def test_nothing_can_save_a_half_made_update(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Saver] = []
    monkeypatch.setattr(loop, "Saver", lambda *args: saved.append(Saver(*args)) or saved[0])
    at_step(monkeypatch, 3, fail_amid_the_update)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.run(tiny())
    with pytest.raises(AssertionError, match="weights of step 2 and of the next are mixed"):
        saved[0].save(Progress(2))


def test_an_error_in_the_first_step_leaves_nothing_and_in_the_second_all(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    for number in (1, 2):
        with monkeypatch.context() as patch:
            at_step(patch, number, fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                loop.run(tiny("run.log_every=100"))
        assert (tmp_path / "run").exists() == (number == 2)


def test_a_run_outlives_the_reader_of_its_output(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Gone())
    assert loop.run(tiny("run.steps=2")) == 0
    assert "done: 2 steps" in (tmp_path / "run" / "logs" / "rank0.log").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disks_are_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    full, said = Path("/dev/full"), []
    with Screen(full) as screen:
        screen.say("one")
        screen.say("two")
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "one" and "cannot be written any more" in lines[1] and lines[2:] == ["two"]
    journal = Journal(full, None, said.append, purge_step=1)
    for step in (1, 2):
        journal.write({"step": step})
    journal.close()
    assert len(said) == 1 and "No space left" in said[0]


def diverge(monkeypatch: pytest.MonkeyPatch, after: int, spoil: bool = False) -> None:
    def poison(engine: Engine) -> None:
        loss = engine.stages[0].run
        engine.stages[0].run = lambda *inputs: loss(*inputs) * math.nan
        if spoil:
            next(iter(engine.model.parameters())).data[0] = math.nan

    at_step(monkeypatch, after + 1, poison)


def test_divergence_is_seen_soon_saved_and_told_truly(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    diverge(monkeypatch, after=3)
    assert loop.run(tiny("run.steps=1000", "run.log_every=1000")) == 1
    run = tmp_path / "run"
    out = capfd.readouterr().out
    assert "4 to 8. Their updates were skipped: the weights are as step 3 left them" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ") and "| lr" in line] == ["1/1000"]
    records = read_metrics(run)
    # Looked at after the first step and then after every five: 2 to 6, 7 to 11.
    assert [r["step"] for r in records] == list(range(1, 12)), "no step is missing"
    assert newest(run) == 11 and records[-1]["skipped_steps"] == 8
    weight = torch.zeros(360, 64)
    manifest = checkpoint.newest_verified(run / "checkpoints")
    assert manifest is not None and manifest.facts["skipped_steps"] == 8
    checkpoint.load(manifest, {"model.embed.weight": weight})
    assert weight.isfinite().all() and weight.any()


def test_spoiled_weights_are_not_saved(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    diverge(monkeypatch, after=3, spoil=True)
    assert loop.run(tiny()) == 1
    assert newest(tmp_path / "run") is None and "not saved" in capfd.readouterr().out


def test_a_folder_filled_since_it_was_looked_at_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", resume=False)
    with RunFolder(tmp_path / "run", resume=False) as other:
        with pytest.raises(RunFolderError, match="in use"), folder:
            pass
        other.stepped = True
    with pytest.raises(RunFolderError, match="exists already"), folder:
        pass
    assert (tmp_path / "run" / "logs").exists()


def test_the_tokenizers_config_comes_along(tiny: Tiny, tmp_path: Path, corpus: Path) -> None:
    """A tokenizer whose end of document has an unusual name, which its config alone tells."""
    there = tmp_path / "tokenizer"
    there.mkdir()
    text = (corpus.parent / "tokenizer.json").read_text().replace("<|endoftext|>", "<|stop|>")
    (there / "own.json").write_text(text)
    (there / "own_config.json").write_text('{"eos_token": "<|stop|>"}')
    with RunFolder(tmp_path / "run", resume=False) as folder:
        folder.begin(tiny(), {}, there / "own.json")
        assert load_tokenizer(folder.path / "tokenizer.json").eos_id == load_tokenizer(there / "own.json").eos_id == 0


def test_a_model_of_more_tokens_than_the_tokenizer_draws_none_of_them(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert loop.run(tiny("model.vocab=4000", "run.steps=2")) == 0
    capfd.readouterr()
    sample.run(tmp_path / "run", "the", max_new_tokens=30, temperature=3, explain=True, device="cpu")
    rows = [line.split("│") for line in capfd.readouterr().out.splitlines() if line.startswith("│")]
    assert rows and all(int(row[1]) < 360 for row in rows)


def test_holes_in_the_ids_are_shown_by_number_and_give_no_text() -> None:
    def token_bytes(token: int) -> bytes:
        raise IndexError(token)

    tokenizer = SimpleNamespace(token_bytes=token_bytes)
    assert sample.Utf8Stream(tokenizer).add(7) == "" and sample._shown(tokenizer, 7) == "<7>"  # type: ignore[arg-type]


def test_a_benchmark_may_be_longer_than_the_run(tiny: Tiny) -> None:
    assert bench.step(tiny("run.steps=1", "optim.warmup_steps=0"), steps=2, warmup=1)["tokens"] == "data"


def test_a_complete_run_without_metrics_can_be_resumed(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Path:
        raise ValueError("no font")

    monkeypatch.setattr(end, "loss_curve", broken)
    assert loop.run(tiny("run.steps=2")) == 0
    assert "no loss.png: no font" in capfd.readouterr().out
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "summary.json").unlink()
    assert loop.run(tiny("run.steps=2"), resume=True) == 0
    assert "holds no step" in capfd.readouterr().out
