"""What stages cost, against the model's FLOPs as a whole."""

import pytest

from megapre.config import Config, load
from megapre.plan import flops
from megapre.plan.activations import layer_activations, layer_operands
from megapre.plan.partition import StageError
from megapre.plan.stages import Rates, stage_costs

UNIT = Rates(flops=1.0, memory=1e30, latency=0.0, link=1.0)


def config(*overrides: str) -> Config:
    return load("llama3-8b", ["layout.tp=1", "layout.pp=4", "batch.seq_length=2048", *overrides])


@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_stages_add_up_to_the_model(chunks: int) -> None:
    cfg = config()
    costs = stage_costs(cfg, chunks, UNIT)
    whole = flops.per_token(cfg.model, cfg.batch.seq_length) * cfg.batch.seq_length
    assert sum(costs.forward) + sum(costs.backward) == pytest.approx(whole, rel=1e-12)
    assert sum(costs.backward) == pytest.approx(2 * sum(costs.forward), rel=1e-12)
    assert costs.backward == pytest.approx([i + w for i, w in zip(costs.input, costs.weights, strict=True)])
    assert len(set(costs.forward[:-1])) == 1
    head = 2 * cfg.model.vocab * cfg.model.hidden * cfg.batch.seq_length
    assert costs.forward[-1] - costs.forward[0] == pytest.approx(head, rel=1e-6)


def test_tensor_parallel_ranks_share_the_work_and_the_messages() -> None:
    one, eight = (stage_costs(config(f"layout.tp={tp}"), 1, UNIT) for tp in (1, 8))
    assert eight.forward == pytest.approx([value / 8 for value in one.forward])
    assert one.message[0] == 2 * 2048 * 4096 and eight.message[0] * 8 == one.message[0]
    whole = stage_costs(config("layout.tp=8", "layout.sequence_parallel=false"), 1, UNIT)
    assert whole.message == one.message


def test_activations_are_those_of_the_memory_plan() -> None:
    cfg = config()
    one = layer_activations(cfg.model, 2048, 2)
    end = 2048 * (2 * 2 * cfg.model.hidden + 4)  # input of the last norm with 1/rms, and what the loss hands back
    costs = stage_costs(cfg, 2, UNIT)
    assert costs.kept == (4 * one + 8 * 2048, *[4 * one] * 6, 4 * one + end)
    assert costs.kept_for_weights == (4 * layer_operands(cfg.model, 2048, 2),) * 8


def test_the_embedding_costs_memory_traffic() -> None:
    costs = stage_costs(config(), 1, Rates(flops=1e30, memory=1.0))
    stream = 2048 * 4096
    assert costs.forward[0] - costs.forward[1] == pytest.approx(2 * 2 * stream)
    assert costs.weights[0] - costs.weights[1] == pytest.approx(10 * stream)


def test_what_cannot_be_cut() -> None:
    with pytest.raises(StageError, match=r"32 layers % \(4 \* 3\) = 8"):
        stage_costs(config(), 3, UNIT)
    with pytest.raises(StageError, match=r"set model.vocab"):
        stage_costs(config("model.vocab=0"), 1, UNIT)
