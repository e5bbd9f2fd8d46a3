"""Parameter counts against the published totals, and against the tensors of the model itself."""

import pytest
import torch

from megapre import kernels
from megapre.config import Model, load
from megapre.model.transformer import Transformer
from megapre.plan import count
from megapre.plan.buffers import Held, parameters

# Sums of the tensors of the released checkpoints (tied heads once).
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-1.5b": 1_557_611_200,
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}

SHAPES = [
    {"family": "gpt2", "layers": 3, "hidden": 48, "heads": 4, "context": 32, "vocab": 100},
    {
        "family": "gpt2",
        "layers": 2,
        "hidden": 48,
        "heads": 4,
        "context": 32,
        "vocab": 100,
        "bias": False,
        "tied": False,
    },
    {"family": "gpt2", "layers": 2, "hidden": 48, "heads": 4, "context": 16, "vocab": 128, "activation": "geglu"},
    {"family": "llama", "layers": 3, "hidden": 48, "heads": 6, "kv_heads": 2, "ffn": 80, "context": 32, "vocab": 100},
    {"family": "llama", "layers": 1, "hidden": 48, "heads": 3, "head_dim": 32, "ffn": 80, "context": 8, "vocab": 9},
    {"family": "llama", "layers": 2, "hidden": 48, "heads": 4, "ffn": 64, "context": 8, "vocab": 200, "qk_norm": True},
    {"family": "llama", "layers": 2, "hidden": 48, "heads": 4, "ffn": 64, "context": 8, "vocab": 200, "bias": True},
]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_have_the_published_totals(recipe: str) -> None:
    assert sum(count(load(recipe).model)) == PUBLISHED[recipe]


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_equal_the_models_tensors(shape: dict[str, object]) -> None:
    model = Model.model_validate(shape)
    built = Transformer(model, kernels.choose("cpu"), dtype=torch.float32, device="meta")
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    parts = count(model)
    padding = (model.vocab_padded - model.vocab) * model.hidden

    def total(*words: str) -> int:
        return sum(size for name, size in sizes.items() if any(word in name for word in words))

    assert parts.embedding == total("embed.") - padding
    assert parts.positions == total("positions.")
    assert parts.head == max(total("head.") - padding, 0)
    assert parts.attention == total("qkv", "attn.out")
    assert parts.ffn == total("mlp.")
    assert parts.norms == total("norm")
    listed = list(parameters(model, 1, Held(model.layers, True, True)))
    names = [name.split(".", 2)[2] if name.startswith("blocks.") else name for name in sizes]
    assert [(name, elements) for name, elements, _ in listed] == list(zip(names, sizes.values(), strict=True))
    assert [parameter.matrix for parameter in listed] == [value.dim() == 2 for value in built.parameters()]


def held(model: Model, tp: int, layers: int, first: bool, last: bool) -> int:
    return sum(parameter.elements for parameter in parameters(model, tp, Held(layers, first, last)))


def test_stages_and_tensor_ranks_hold_everything_once() -> None:
    model = load("llama3-8b").model
    norms = model.layers * 2 * model.hidden
    whole = sum(count(model))
    assert sum(held(model, 1, 8, stage == 0, stage == 3) for stage in range(4)) == whole
    one_of_eight = held(model, 8, 32, first=True, last=True)
    assert 8 * one_of_eight == whole + 7 * (norms + model.hidden)  # norms are on every tensor rank


def test_tied_tables_are_on_both_ends() -> None:
    model = load("llama3-1b").model
    ends = sum(held(model, 1, 8, stage == 0, stage == 1) for stage in range(2))
    assert ends == sum(count(model)) + model.vocab * model.hidden
