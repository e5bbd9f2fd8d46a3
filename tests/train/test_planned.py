"""Whether the parameters' state fits: that of all ranks on a machine, stage by stage."""

import pytest
import torch

from megapre.config import load
from megapre.mesh import Mesh
from megapre.parallel.comm import Place
from megapre.plan import render
from megapre.plan.memory import all_ranks
from megapre.train import machine
from megapre.train.planned import TooLarge, others, plan_of

UNEQUAL = (
    "layout.pp=2",
    "layout.dp=2",
    "model.vocab=50000",
    "model.tied=false",
    "batch.micro=1",
    "model.layers=4",
    "layout.stages=[3,1]",
)


@pytest.mark.parametrize(("local_world", "told"), [(4, "of the 4 ranks on this machine"), (2, "of the 2 ranks on")])
def test_the_ranks_of_a_machine_must_fit_together(monkeypatch: pytest.MonkeyPatch, local_world: int, told: str) -> None:
    cfg = load("debug", UNEQUAL)
    first, last = (memory.states for memory in all_ranks(cfg, 2))
    assert first > 1.02 * last, "stages that differ"
    for rank in range(4):
        room = 2 * first + 2 * last if local_world == 4 else 2 * (first, last)[rank // 2]
        here = Place(rank, 4, rank % local_world, local_world)
        monkeypatch.setattr(machine, "memory_size", lambda _, room=room: room)
        plan_of(cfg, torch.device("cpu"), Mesh(4, pp=2), here)
        monkeypatch.setattr(machine, "memory_size", lambda _, room=room: room - 1)
        with pytest.raises(TooLarge, match=f"{told}.*choose a smaller model, or more ranks"):
            plan_of(cfg, torch.device("cpu"), Mesh(4, pp=2), here)


def test_one_rank_is_told_without_a_word_on_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_size", lambda _: 1000)
    with pytest.raises(TooLarge, match=r"moments alone, but .* has 1.0K; choose a smaller model$"):
        plan_of(load("debug", ["model.vocab=300"]), torch.device("cpu"), Mesh(1), Place())


def test_the_plan_of_a_run_knows_the_room_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, cpu = load("debug", ["model.vocab=300"]), torch.device("cpu")
    states = all_ranks(cfg, 1)[0].states
    monkeypatch.setattr(machine, "memory_size", lambda _: states)
    alone = plan_of(cfg, cpu, Mesh(1), Place())
    assert alone.room == states < alone.memory.total and "DOES NOT FIT" in render(alone)
    monkeypatch.setattr(machine, "memory_size", lambda _: 4 * states)
    assert plan_of(cfg, cpu, Mesh(2), Place(0, 2, 0, 2)).room is None, "which two ranks share"


def test_the_box_leaves_out_what_the_model_has_not() -> None:
    llama, gpt = load("debug").model, load("gpt2-124m").model
    assert others(gpt) == {"rms_norm", "rope", "rope_", "swiglu", "geglu"}
    assert others(llama) == {"layer_norm", "gelu", "geglu"}
    assert "rms_norm" not in others(gpt.model_copy(update={"qk_norm": True}))
