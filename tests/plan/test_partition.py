"""Cuts of a model into stages: balanced against every possible cut, and what the layout says."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre.config import load, to_toml
from megapre.plan import flops
from megapre.plan.partition import StageError, balanced, costs, layers_of_stages
from megapre.schedule import holder


def fullest(cut: tuple[int, ...], ranks: list[int], first: float, last: float) -> float:
    work = [0.0] * (max(ranks) + 1)
    for stage, layers in enumerate(cut):
        work[ranks[stage]] += layers + first * (stage == 0) + last * (stage == len(cut) - 1)
    return max(work)


@given(
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(0, 9),
    st.sampled_from(["loop", "v"]),
    st.floats(0, 1),
    st.floats(0, 5),
)
def test_no_cut_has_a_less_loaded_fullest_rank(
    pp: int, chunks: int, more: int, placement: str, first: float, last: float
) -> None:
    stages = pp * chunks
    ranks = [holder(stage, pp, placement)[0] for stage in range(stages)]  # type: ignore[arg-type]
    layers = stages + more
    cut = balanced(layers, ranks, 1.0, first, last)
    assert sum(cut) == layers and min(cut) >= 1
    cuts = (
        tuple(b - a for a, b in zip((0, *inner), (*inner, layers), strict=True))
        for inner in combinations(range(1, layers), stages - 1)
    )
    best = min(fullest(other, ranks, first, last) for other in cuts)
    assert fullest(cut, ranks, first, last) == pytest.approx(best)


def test_without_ends_stages_differ_by_a_layer_at_most_and_the_later_ones_have_more() -> None:
    assert balanced(26, [0, 1, 2, 3], 1.0, 0.0, 0.0) == (6, 6, 7, 7)
    assert balanced(26, [0, 1, 2, 3] * 2, 1.0, 0.0, 0.0) == (3, 3, 3, 3, 3, 3, 4, 4)


def test_costs_are_the_flops_of_the_model() -> None:
    cfg = load("llama3-8b")
    one, embedding, head = costs(cfg)
    assert 32 * one + head == flops.per_token(cfg.model, cfg.batch.seq_length)
    assert 2 < head / one < 3 and 0 < embedding / one < 0.02
    with pytest.raises(StageError, match=r"set model.vocab"):
        costs(load("llama3-8b", ["model.vocab=0"]))


def test_the_layout_says_how_a_model_is_cut() -> None:
    assert layers_of_stages(load("llama3-8b", ["layout.pp=4"])) == (8, 8, 8, 8)
    assert layers_of_stages(load("llama3-8b", ["layout.pp=4", "layout.balance=true"])) == (8, 9, 9, 6)
    given = load("llama3-8b", ["layout.pp=4", "layout.stages=[10, 10, 10, 2]"])
    assert layers_of_stages(given) == (10, 10, 10, 2)
    assert "stages = [10, 10, 10, 2]" in to_toml(given)
    assert layers_of_stages(load("llama3-8b", ["layout.pp=4", "layout.balance=true", "model.layers=26"])) == (
        7,
        7,
        7,
        5,
    )
    with pytest.raises(StageError, match=r"32 layers % \(4 \* 3\) = 8"):
        layers_of_stages(load("llama3-8b", ["layout.pp=4"]), chunks=3)


def test_balance_is_that_of_the_ranks_of_the_schedule() -> None:
    """On a V the first rank has both ends, and so fewer layers."""
    cfg = load("llama3-8b", ["layout.pp=4", "layout.vpp=2", "layout.balance=true"])
    loop, back = (layers_of_stages(cfg, placement=placement) for placement in ("loop", "v"))
    assert layers_of_stages(cfg) == loop
    assert back[0] + back[7] < min(back[r] + back[7 - r] for r in (1, 2, 3))
    assert loop[3] + loop[7] < min(loop[r] + loop[4 + r] for r in (0, 1, 2))
