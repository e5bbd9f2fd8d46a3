"""fp16 with a scaled loss, and bf16 without master weights: near fp32, exact in what they skip, bitwise on resume."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_loop import curve, final_hash, interrupt, terminate
from torch import Tensor

from megapre.config import Config, load
from megapre.plan import fullest_rank
from megapre.train import loop
from megapre.train.bench import made_up
from megapre.train.changes import ResumeError
from megapre.train.folder import read_metrics
from megapre.train.report import SKIPS_IN_ROW
from megapre.train.step import Engine, StepResult

CPU = torch.device("cpu")
Tiny = Callable[..., Config]
BARE = ("run.dtype=bf16", "optim.master=none")


def debug(*overrides: str) -> Config:
    return load("debug", ["model.vocab=300", *overrides])


def losses(steps: int, *overrides: str) -> list[float]:
    cfg = debug(*overrides)
    engine, batches = Engine(cfg, CPU), made_up(cfg)
    return [engine.step(next(batches), 3e-3).loss.item() for _ in range(steps)]


def overflow(engine: Engine) -> Callable[[], None]:
    """Makes one gradient infinite from here on; returns what undoes it."""
    weight = engine.model.norm.weight  # its gradient comes through autograd
    return weight.register_hook(lambda grad: torch.where(grad == grad.max(), math.inf, grad)).remove


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fp16_follows_fp32(family: str) -> None:
    """fp16 rounds by at most 2^-11 = 0.0005 of a value: logits and loss of size 6 by 0.003, and 20 steps add little."""
    fp32, fp16 = (losses(20, f"run.dtype={dtype}", f"model.family={family}") for dtype in ("fp32", "fp16"))
    assert fp32[-1] < fp32[0] - 0.2, "nothing was learned, so nothing was compared"
    assert max(abs(a - b) for a, b in zip(fp32, fp16, strict=True)) < 0.003


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_bf16_without_master_follows_fp32(moments: str) -> None:
    """The bound of bf16 with master weights, doubled for the weights' own rounding, which is random."""
    fp32, bare = losses(40, "run.dtype=fp32"), losses(40, *BARE, f"optim.moments={moments}")
    assert max(abs(a - b) for a, b in zip(fp32, bare, strict=True)) < 0.06


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bf16_gradient_sums_cost_what_they_may(family: str) -> None:
    """One step of k micro-batches: the gradient is off by at most k 2^-9 of itself in norm, mostly sqrt(k) of that."""
    micro_batches = 32
    overrides = ("run.dtype=bf16", f"model.family={family}", f"batch.global={2 * micro_batches}", "optim.clip=0")
    sums = []
    for grad_dtype in ("fp32", "bf16"):
        engine = Engine(debug(*overrides, f"optim.grad_dtype={grad_dtype}"), CPU)
        norm = engine.step(next(made_up(engine.cfg)), 0.0).grad_norm
        sums.append(torch.cat([group.grad.double() for group in engine.flat.groups]))
        assert norm.item() == pytest.approx(torch.linalg.vector_norm(sums[-1]).item(), rel=1e-6)
    error = torch.linalg.vector_norm(sums[1] - sums[0]) / torch.linalg.vector_norm(sums[0])
    assert 0 < error < micro_batches**0.5 * 2**-9


def test_bf16_gradient_sums_follow_fp32_ones() -> None:
    """Over 40 steps of four micro-batches: losses differ by less than bf16 differs from fp32 anyway."""
    fp32, bf16 = (losses(40, "run.dtype=bf16", f"optim.grad_dtype={dtype}") for dtype in ("fp32", "bf16"))
    assert max(abs(a - b) for a, b in zip(fp32, bf16, strict=True)) < 0.03


def test_norm_and_update_do_not_see_the_scale() -> None:
    """A power of two drops out exactly, as long as nothing leaves fp16 at either end: of one step, to its rounding."""
    results: list[tuple[StepResult, Tensor]] = []
    for scale in (2.0**10, 2.0**14):
        cfg = debug("run.dtype=fp16", f"optim.loss_scale={scale}", "optim.clip=0.5")
        engine = Engine(cfg, CPU)
        results.append((engine.step(next(made_up(cfg)), 1e-3), engine.optimizer.exp_avg[0].clone()))
        assert results[-1][0].loss_scale == scale
    (low, low_avg), (high, high_avg) = results
    assert torch.equal(low.loss, high.loss)
    torch.testing.assert_close(low.grad_norm, high.grad_norm, rtol=1e-3, atol=0)
    torch.testing.assert_close(low_avg, high_avg, rtol=0.05, atol=2**-11 * low_avg.abs().max().item())
    assert torch.linalg.vector_norm(low_avg).item() == pytest.approx(0.1 * 0.5, rel=0.05)  # (1 - beta1) * clip


def test_an_overflow_skips_halves_and_goes_on() -> None:
    cfg = debug("run.dtype=fp16", "optim.loss_scale_window=2")
    engine, batches = Engine(cfg, CPU), made_up(cfg)
    seen = []
    for step in range(1, 7):
        undo = overflow(engine) if step in (2, 3) else None
        state = [*(t for g in engine.flat.groups for t in (g.param, g.master)), *engine.optimizer.exp_avg]
        before = [t.clone() for t in state]
        result = engine.step(next(batches), 1e-3)
        assert result.loss_scale is not None
        seen.append((result.loss_scale.item() / 65536, result.skipped.item()))
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True)) == (step in (2, 3))
        assert result.loss.isfinite() and result.grad_norm.isfinite() == (step not in (2, 3))
        if undo is not None:
            undo()
    # The scale that each step ran with. Two good steps after the overflows double it again.
    assert seen == [(1, 0), (1, 1), (0.5, 1), (0.25, 0), (0.25, 0), (0.5, 0)]
    assert engine.optimizer.updates.item() == 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_dtypes_have_no_scale(dtype: str) -> None:
    engine = Engine(debug(f"run.dtype={dtype}"), CPU)
    assert engine.loss_scale is None and engine.feed.upstream is engine.feed.per_token
    assert engine.step(next(made_up(engine.cfg)), 1e-3).loss_scale is None


def test_without_master_there_is_one_copy_and_seed_and_step_decide_the_rounding() -> None:
    ends = []
    for seed in (1, 1, 2):
        engine = Engine(debug(*BARE, "optim.moments=bf16"), CPU)
        assert all(group.master is group.param for group in engine.flat.groups)
        assert {t.dtype for t in engine.optimizer.exp_avg + engine.optimizer.exp_avg_sq} == {torch.bfloat16}
        engine.optimizer.seed = seed
        engine.step(next(made_up(engine.cfg)), 1e-4)
        ends.append(torch.cat([group.param for group in engine.flat.groups]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.dtype=fp32",),
        ("run.dtype=fp16",),
        ("run.dtype=bf16", "optim.grad_dtype=bf16"),
        BARE,
        (*BARE, "optim.moments=bf16", "optim.grad_dtype=bf16"),
    ],
)
def test_the_state_is_what_the_plan_says(overrides: tuple[str, ...]) -> None:
    engine = Engine(debug(*overrides), CPU)
    groups, optimizer = engine.flat.groups, engine.optimizer
    bytes_ = {
        "weights": sum(group.param.nbytes for group in groups),
        "gradients": sum(group.grad.nbytes for group in groups),
        "master": sum(group.master.nbytes for group in groups if group.master is not group.param),
        "moments": sum(moment.nbytes for moment in optimizer.exp_avg + optimizer.exp_avg_sq),
    }
    planned = fullest_rank(engine.cfg).as_json()
    assert bytes_ == {name: planned[name] for name in bytes_}  # nothing to align: all lengths are multiples of 64


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.dtype=fp16", "optim.loss_scale_window=3"),
        (*BARE, "optim.moments=bf16"),
        (*BARE, "model.family=gpt2"),
        (*BARE, "optim.moments=bf16", "optim.grad_dtype=bf16"),
    ],
    ids=["fp16", "bare-bf16-moments", "bare", "bare-all-bf16"],
)
def test_resume_is_bitwise(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    step = Engine.step

    def overflowing(self: Engine, *args: object, **options: object) -> StepResult:
        undo = overflow(self) if self.loss_scale is not None and self.optimizer.updates == 4 else None
        if self.loss_scale is not None and self.loss_scale.scale < 2**17:
            undo = undo() if undo is not None else None
        result = step(self, *args, **options)  # type: ignore[arg-type]
        if undo is not None:
            undo()
        return result

    monkeypatch.setattr(Engine, "step", overflowing)  # the fifth update is skipped once, at the doubled scale
    assert loop.run(tiny("name=whole", *overrides)) == 0
    for at in (4, 6, 9):
        cfg = tiny(f"name=cut{at}", *overrides)
        with monkeypatch.context() as patch:
            interrupt(patch, at, terminate)
            assert loop.run(cfg) == 75
        assert loop.run(cfg, resume=True) == 0
        run, whole = tmp_path / f"cut{at}", tmp_path / "whole"
        assert curve(run) == curve(whole) and final_hash(run) == final_hash(whole)
        scales = [[r.get("loss_scale") for r in read_metrics(folder)] for folder in (run, whole)]
        assert scales[0] == scales[1]
        if "run.dtype=fp16" in overrides:
            assert scales[0][:6] == [2**16, 2**16, 2**16, 2**17, 2**17, 2**16]
        else:
            assert scales[0] == [None] * 12 and "loss_scale" not in read_metrics(run)[0]


def test_overflows_do_not_end_a_run_but_lost_losses_and_an_exhausted_scale_do(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = Engine.step

    def overflowing(self: Engine, *args: object, **options: object) -> StepResult:
        undo = overflow(self)
        result = step(self, *args, **options)  # type: ignore[arg-type]
        undo()
        return result

    monkeypatch.setattr(Engine, "step", overflowing)
    assert loop.run(tiny("run.dtype=fp16", "run.steps=60")) == 1
    out = capfd.readouterr().out
    # 65536 halved 16 times is 1; from there skipped steps count.
    assert out.count("scale halved") == 16
    assert f"not finite in {SKIPS_IN_ROW} steps in a row, 17 to 21, the last with its loss scaled by 1. " in out
    assert "other data, a new run with run.dtype bf16" in out
    assert "the gradients left fp16 with the loss scaled by 65536: update skipped, 1 so far" in out
    assert "| scale 65536 |" in out
    assert loop.run(tiny("name=fixed", "run.dtype=fp16", "optim.loss_scale=1048576", "run.steps=60")) == 1
    out = capfd.readouterr().out
    assert f"in {SKIPS_IN_ROW} steps in a row, 1 to {SKIPS_IN_ROW}, the last with its loss scaled by 1048576. " in out
    assert "other data, optim.loss_scale 0 (dynamic)" in out


def test_precision_cannot_change_on_resume(tiny: Tiny) -> None:
    assert loop.run(tiny("run.steps=2", *BARE)) == 0
    for change in ("optim.master=fp32", "optim.moments=bf16"):
        with pytest.raises(ResumeError, match=change.split("=")[0]):
            loop.run(tiny("run.steps=3", *BARE, change), resume=True)


def test_a_fixed_scale_can_be_changed_on_resume(tiny: Tiny, tmp_path: Path) -> None:
    assert loop.run(tiny("run.steps=2", "run.dtype=fp16", "optim.loss_scale=1024")) == 0
    assert loop.run(tiny("run.steps=4", "run.dtype=fp16", "optim.loss_scale=512"), resume=True) == 0
    assert [r["loss_scale"] for r in read_metrics(tmp_path / "run")] == [1024, 1024, 512, 512]
