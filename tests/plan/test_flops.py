"""FLOPs against the published formula, published numbers, and the products that the model really does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megapre import kernels
from megapre.config import Model, load
from megapre.model.transformer import Transformer
from megapre.plan.flops import by_part, per_token


@given(
    batch=st.integers(1, 64),
    seq=st.integers(1, 64).map(lambda n: 128 * n),
    layers=st.integers(1, 100),
    heads=st.integers(1, 64),
    vocab=st.integers(2, 200_000),
)
def test_gpt_equals_narayanan_equation_3(batch: int, seq: int, layers: int, heads: int, vocab: int) -> None:
    h = 64 * heads
    model = Model(family="gpt2", layers=layers, hidden=h, heads=heads, context=seq, vocab=vocab)
    # 72 B s L h^2 (1 + s/(6h) + V/(12 L h)), multiplied out to stay in whole numbers
    formula = 72 * batch * seq * layers * h * h + 12 * batch * seq * seq * layers * h + 6 * batch * seq * vocab * h
    assert batch * seq * per_token(model, seq, "full") == formula
    plain = 72 * batch * seq * layers * h**2 * (1 + seq / (6 * h) + vocab / (12 * layers * h))
    assert math.isclose(formula, plain, rel_tol=1e-12)


def test_llama3_8b_at_8192_as_published() -> None:
    cfg = load("llama3-8b")
    assert round(per_token(cfg.model, 8192, "full") / 1e9, 1) == 57.9
    assert round(per_token(cfg.model, 8192, "half") / 1e9, 1) == 51.5


def test_half_differs_from_full_by_half_the_scores() -> None:
    model = load("llama3-8b").model
    half, full = by_part(model, 8192, "half"), by_part(model, 8192, "full")
    assert 2 * half.pop("scores") == full.pop("scores")
    assert half == full


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_models_own_products_cost_what_is_counted(family: str) -> None:
    """torch's counter sees the layers' matrix products; scores and head are inside ops it does not know."""
    extra = {"kv_heads": 2, "ffn": 96} if family == "llama" else {}
    shape = {"family": family, "layers": 2, "hidden": 32, "heads": 4, "context": 16, "vocab": 50, **extra}
    model = Model.model_validate(shape)
    built = Transformer(model, kernels.choose("cpu", {"linear": "torch"}), dtype=torch.float32)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.arange(32).view(2, 16)
    with FlopCounterMode(display=False) as counter:
        built.hidden(tokens).sum().backward()
    products = sum(
        flops
        for name, flops in counter.get_flop_counts()["Global"].items()
        if str(name) in {"aten.mm", "aten.addmm", "aten.bmm"}
    )
    # The first layer's norm output needs its gradient too: the embedding before it is trained.
    assert products == 32 * by_part(model, 16)["matrices"]
