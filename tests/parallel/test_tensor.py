"""Layers cut over ranks compute what the whole model computes: outputs and every gradient, for any cut."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapre import kernels
from megapre.config import Model
from megapre.kernels.linear import native, products, reference, torch_linear
from megapre.model import initialize
from megapre.model.cut import held, is_cut, needs_sum
from megapre.model.transformer import Transformer
from megapre.parallel.tensor import TensorGroup

BASE = {"layers": 2, "hidden": 32, "heads": 8, "context": 16, "vocab": 200}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2, untied, no biases": {"family": "gpt2", "tied": False, "bias": False},
    "llama": {"family": "llama", "ffn": 48},
    "llama, two kv heads, tied": {"family": "llama", "ffn": 48, "kv_heads": 2, "tied": True},
    "llama, one kv head, norms in heads": {"family": "llama", "ffn": 48, "kv_heads": 1, "qk_norm": True},
}
HOWS = {"": {}, "sequence": {"sequence": True}, "ring": {"sequence": True, "ring": True}}


def step(
    shape: str, dtype: torch.dtype, tensor: TensorGroup | None, names: dict[str, str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a rank's share of the model, on tokens and positions of their own kind."""
    cfg = Model.model_validate(BASE | SHAPES[shape])
    ops = kernels.choose("cpu", {"attention": "reference", **(names or {})})
    model = Transformer(cfg, ops, dtype=dtype, tensor=tensor)
    initialize(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # norms and biases that do something, the same on every rank
        for name, value in sorted(model.named_parameters()):
            if value.dim() == 1 and not is_cut(name):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    tokens_BS = torch.randint(200, (2, 8), generator=generator)
    positions_BS = torch.randint(16, (2, 8), generator=generator)
    loss = model.loss(tokens_BS, tokens_BS.roll(-1, 1), positions_BS)
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def share(
    shape: str, dtype: torch.dtype, how: dict[str, bool], names: dict[str, str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    group = dist.group.WORLD
    assert group is not None
    return step(shape, dtype, TensorGroup(group, dist.get_rank(), dist.get_world_size(), **how), names)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_those_of_the_whole(run_on: RunOn, shape: str, size: int, how: str) -> None:
    loss, gradients = step(shape, torch.float64, None)
    shares = run_on(size, share, shape, torch.float64, HOWS[how])
    assert all(torch.equal(found, shares[0][0]) for found, _ in shares)
    torch.testing.assert_close(shares[0][0], loss, rtol=1e-12, atol=0)
    cfg = Model.model_validate(BASE | SHAPES[shape])
    for name, gradient in gradients.items():
        parts = [found[name] for _, found in shares]
        where = [held(name, part.shape, cfg, rank, size) for rank, part in enumerate(parts)]
        true = gradient[: where[0].shape[0]]
        if is_cut(name) or needs_sum(name, HOWS[how].get("sequence", False)):
            whole = torch.zeros(where[0].shape, dtype=torch.float64)  # what several ranks hold adds up
            for place, part in zip(where, parts, strict=True):
                for target, source in place.pieces(whole, part):
                    target += source
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            whole = parts[0]
        torch.testing.assert_close(whole, true, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


class Ran(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def products_that_ran(how: dict[str, bool], name: str) -> tuple[Tensor, set[str]]:
    with Ran() as ran:
        loss, _ = share(
            "gpt2", torch.float32, how, {"linear": name, "vocab_parallel_linear_cross_entropy": "reference"}
        )
    return loss, ran.names & {f"megapre::linear{kind}_" for kind in ("", "_input_gradient", "_weight_gradient")}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["native", "torch", "reference"])
def test_the_linear_that_the_config_names_is_the_one_that_runs(run_on: RunOn, name: str, how: str) -> None:
    whole, _ = step("gpt2", torch.float32, None, {"linear": name})
    for loss, ran in run_on(2, products_that_ran, HOWS[how], name):
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
        assert len(ran) == (3 if name == "native" else 0)


@pytest.mark.parametrize("name", ["native", "torch", "reference"])
def test_products_are_those_of_the_linear_layer(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias, dy = (torch.randn(shape, generator=generator) for shape in ((2, 3, 4), (5, 4), (5,), (2, 3, 5)))
    parts = [value.to(torch.bfloat16).requires_grad_() for value in (x, weight, bias)]
    linear = {"native": native, "torch": torch_linear, "reference": reference}[name]
    y = linear(*parts)
    y.backward(dy.bfloat16())
    ops = products(linear)
    with torch.no_grad():
        assert torch.equal(ops.product(*parts), y)
        found = (ops.input_gradient(dy.bfloat16(), parts[1]), *ops.weight_gradients(dy.bfloat16(), *parts))
    torch.testing.assert_close(found, tuple(part.grad for part in parts), rtol=2**-7, atol=2**-7)
    with pytest.raises(ValueError, match="linear: add has no products of its own; there are those of native, torch"):
        products(torch.add)
