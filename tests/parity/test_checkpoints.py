"""A checkpoint has no layout: what any layout saves, any other loads, bit for bit, and training goes on as it would."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn
from test_layouts import GPT2, LAYOUTS, LR, ONE_HEAD, TWO_HEADS, config, ranks_of, share_of_batch
from torch import Tensor

from megapre import checkpoint
from megapre.checkpoint.state import training_tensors
from megapre.parallel.comm import Place
from megapre.train.step import Engine, connected

BEFORE, AFTER = 2, 3


def engine_of(model: str, layout: dict[str, Any]) -> Engine:
    cfg = config(model, "fp32", layout)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    place = Place(dist.get_rank(), ranks, dist.get_rank(), ranks) if ranks > 1 else Place()
    return Engine(cfg, torch.device("cpu"), connected(cfg, place, torch.device("cpu")))


def steps(engine: Engine, first: int, count: int) -> list[float]:
    dp = engine.groups.dp
    batches = (share_of_batch(engine.cfg, step, dp.index, dp.size) for step in range(first, first + count))
    return [engine.step(batch, LR).loss.item() for batch in batches]


def state(engine: Engine) -> dict[str, Any]:
    engine.settle()
    return training_tensors(engine.cfg.model, engine.flat, engine.optimizer, engine.loss_scale, engine.groups)


def saved(model: str, layout: dict[str, Any], folder: Path) -> list[float]:
    engine = engine_of(model, layout)
    steps(engine, 0, BEFORE)
    checkpoint.save(folder, BEFORE, state(engine), {}, engine.groups.world.handle)
    return steps(engine, BEFORE, AFTER)


def resumed(model: str, layout: dict[str, Any], folder: Path, again: Path) -> list[float]:
    """Loads, saves what was loaded under this layout, and goes on."""
    engine = engine_of(model, layout)
    checkpoint.load(checkpoint.verify(folder / "step_00000002"), state(engine))
    for group in engine.flat.groups:
        assert not any(piece.param.isnan().any() for piece in group.pieces())
    checkpoint.save(again, BEFORE, state(engine), {}, engine.groups.world.handle)
    return steps(engine, BEFORE, AFTER)


def contents(folder: Path, engine: Engine) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    found = {name: torch.full(pieces.shape, torch.nan) for name, pieces in state(engine).items()}
    checkpoint.load(checkpoint.verify(folder / "step_00000002"), found)
    return found


@pytest.mark.parametrize(
    ("model", "writes", "reads"),
    [
        (GPT2, "tp2 pp2 dp2 zbv", "tp2 sp"),
        (TWO_HEADS, "tp2 pp2 dp2 interleaved", "dp4 sharded"),
        (ONE_HEAD, "tp4", "pp2 dp2, stages of 3 and 1"),
        (GPT2, "dp4 sharded", "tp2 pp2 dp2 1f1b"),
        (TWO_HEADS, "alone", "tp4 sp ring"),
        (ONE_HEAD, "dp4 whole", "alone"),
    ],
)
def test_any_layout_reads_what_any_other_wrote(
    run_on: RunOn, tmp_path: Path, model: str, writes: str, reads: str
) -> None:
    layouts = {name: layout for name, (layout, _) in LAYOUTS.items()} | {"alone": {}}
    first, second = layouts[writes], layouts[reads]
    (losses, *_) = run_on(ranks_of(first), saved, model, first, tmp_path / "first")
    (found, *_) = run_on(ranks_of(second), resumed, model, second, tmp_path / "first", tmp_path / "second")
    assert found == pytest.approx(losses, rel=1e-5)
    whole = engine_of(model, {})
    before, after = (contents(tmp_path / name, whole) for name in ("first", "second"))
    assert len(before) > 30
    for name, value in before.items():
        assert not value.isnan().any(), f"{writes} wrote not all of {name}"
        assert torch.equal(value, after[name]), name
