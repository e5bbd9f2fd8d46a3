"""Memory by category: what is measured adds up, and each category stands beside its prediction."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megapre import plan
from megapre.config import Config, load
from megapre.mesh import Mesh
from megapre.train import loop, machine, memory
from megapre.train.step import Engine

CPU = torch.device("cpu")


def test_states_are_as_predicted_and_the_rest_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load("debug", ["model.vocab=300", "run.dtype=bf16"])
    engine = Engine(cfg, CPU)
    monkeypatch.setattr(machine, "peak_memory", lambda device: 10**9)
    found, predicted = memory.measured(engine, 10**8), plan.predict(cfg, Mesh(1)).memory
    assert memory.total(found) == 9 * 10**8
    for name in memory.STATES:  # the buffers' gaps come on top
        assert getattr(predicted, name) <= found[name] <= 1.05 * getattr(predicted, name) + 4096, name
    text = memory.comparison(predicted, found)
    assert all(name in text for name in (*memory.STATES, memory.REST))


def test_on_a_gpu_the_allocator_tells_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load("debug", ["model.vocab=300", "run.dtype=fp32"])
    engine = Engine(cfg, CPU)
    states = sum(memory.measured(engine, 0)[name] for name in memory.STATES)
    engine.device, engine.feed.kept = torch.device("cuda"), states + 700
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: states + 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: states + 1500)
    found = memory.measured(engine, 0)
    assert {name: found[name] for name in ("master", *list(found)[4:])} == {
        "master": 0,
        "activations": 700,
        "logits, workspace": 300,
        "slack": 500,
    }
    assert memory.total(found) == states + 1000
    assert "master" not in memory.comparison(plan.predict(cfg, Mesh(1)).memory, found), "nothing, as predicted"


def test_a_run_ends_with_the_comparison(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loop.run(tiny("name=whole")) == 0
    found = json.loads((tmp_path / "whole" / "summary.json").read_text())["memory_bytes"]
    assert found["measured"]["total"] == sum(size for name, size in found["measured"].items() if name != "total")
    assert found["predicted"]["weights"] > 0
    assert "of it predicted, measured: weights " in capsys.readouterr().out
