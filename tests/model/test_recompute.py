"""Recomputing changes no bit of any gradient, and keeps exactly the bytes that the planner counts."""

from typing import Any

import pytest
import torch
from alive import Alive

from megapre import kernels
from megapre.config import Model
from megapre.model import initialize
from megapre.model.recompute import Recompute
from megapre.model.transformer import Piece, Transformer
from megapre.plan.activations import layer_activations

BASE: dict[str, Any] = {"hidden": 48, "heads": 4, "vocab": 200, "context": 32, "ffn": 96}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "kv_heads": 2},
    "qk-norm-geglu": {"family": "llama", "kv_heads": 1, "qk_norm": True, "activation": "geglu"},
}
SETTINGS = {
    "norm": Recompute(norm=True),
    "activation": Recompute(activation=True),
    "norm, activation": Recompute(norm=True, activation=True),
    "block": Recompute(blocks=9),
    "two of three blocks": Recompute(norm=True, activation=True, blocks=2),
    "blocks by two": Recompute(blocks=9, group=2),
}
TOKENS = torch.randint(200, (2, 32), generator=torch.Generator().manual_seed(7))


def built(shape: str, layers: int, recompute: Recompute, dtype: torch.dtype, piece: Piece | None = None) -> Transformer:
    cfg = Model(**{**BASE, **SHAPES[shape], "layers": layers})
    model = Transformer(cfg, kernels.choose("cpu"), dtype=dtype, recompute=recompute, piece=piece)
    initialize(model, 1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_same(shape: str, setting: str, dtype: torch.dtype) -> None:
    gradients = []
    for recompute in (Recompute(), SETTINGS[setting]):
        model = built(shape, 3, recompute, dtype)
        model.loss(TOKENS, TOKENS).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        found = gradients[1][name]
        if dtype is torch.float32 or not SETTINGS[setting].blocks:
            assert torch.equal(gradient, found), name
        else:  # a rounding more of the stream's gradient at each of up to three entries
            assert torch.dist(gradient, found) <= 3 * 2**-8 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [(), ("norm",), ("activation",), ("norm", "activation"), ("block",)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_keeps_what_is_counted(shape: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
    recompute = Recompute("norm" in names, "activation" in names, 9 if "block" in names else 0)
    kept = []
    for layers in (1, 3):
        model = built(shape, layers, recompute, dtype, Piece(True, range(layers), False))
        with Alive() as alive:
            stream = model.run(None, TOKENS, TOKENS)
            kept.append(alive.bytes())
        assert stream.requires_grad
    one = layer_activations(model.cfg, TOKENS.numel(), dtype.itemsize, recompute=names)
    assert kept[1] - kept[0] == 2 * one
