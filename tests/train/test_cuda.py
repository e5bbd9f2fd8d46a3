"""The same route on a GPU. Skipped where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megapre.config import Config, load
from megapre.train import loop
from megapre.train.bench import made_up
from megapre.train.folder import read_metrics
from megapre.train.step import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def debug(*overrides: str) -> Config:
    return load("debug", ["model.vocab=300", *overrides])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fp32_losses_are_those_of_the_cpu(family: str) -> None:
    curves = []
    for device in ("cpu", "cuda"):
        cfg = debug(f"model.family={family}")
        engine, batches = Engine(cfg, torch.device(device)), made_up(cfg)
        curves.append([float(engine.step(next(batches), 1e-3).loss) for _ in range(20)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)  # fp32 sums in another order, over 20 steps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(dtype: str) -> None:
    cfg = debug(f"run.dtype={dtype}")
    engine, batches = Engine(cfg, torch.device("cuda")), made_up(cfg)
    engine.step(next(batches), 1e-3)  # libraries wait while they set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = engine.step(next(batches), 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.skipped.item() == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_is_bitwise(tiny: Callable[..., Config], tmp_path: Path, dtype: str) -> None:
    cuda = ("run.device=cuda", f"run.dtype={dtype}", "run.deterministic=true", "checkpoint.every=5")
    assert loop.run(tiny("name=whole", *cuda)) == 0
    assert loop.run(tiny("name=cut", *cuda)) == 0
    newest = tmp_path / "cut" / "checkpoints" / "step_00000012"
    newest.rename(tmp_path / "away")
    assert loop.run(tiny("name=cut", *cuda), resume=True) == 0
    curves = [[(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / n)] for n in ("whole", "cut")]
    assert curves[0] == curves[1] and len(curves[0]) == 12
    assert read_metrics(tmp_path / "whole")[0]["memory_bytes"] > 0
