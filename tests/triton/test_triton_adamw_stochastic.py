"""AdamW with random rounding: the bits of the definition, at any offset, and its update within a spacing of bf16."""

import math
from typing import Any

import pytest
import torch
from rule import same
from torch import Tensor

from megapre.kernels import adamw
from megapre.kernels.triton import ops

HYPER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
MOMENTS = [torch.float32, torch.bfloat16]


def drawn(length: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def scalars(device: str, step: float = 3.0, **more: float) -> dict[str, Any]:
    return {name: torch.tensor(value, device=device) for name, value in {"lr": 1e-2, "step": step, **more}.items()}


def state(length: int, device: str, moments: torch.dtype) -> list[Tensor]:
    """Parameter and both moments."""
    made = [drawn(length, seed, device) for seed in range(3)]
    return [made[0].bfloat16(), made[1].to(moments), made[2].abs().to(moments)]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("length, offset", [(1, 0), (129, 1), (1000, 127), (5000, 2**32 * 8 - 3), (333, 2**40 + 17)])
@pytest.mark.parametrize("seed, step", [(0, 1.0), (2**63 - 1, 2.0**24), (2**32 + 2**31, 1.0)])
def test_the_random_bits_are_the_references(
    device: str, moments: torch.dtype, length: int, offset: int, seed: int, step: float
) -> None:
    """What is rounded is exact: with beta = 0 the moments are g and g^2, with g = 0 the parameter is one product."""
    exact = {**HYPER, "beta1": 0.0, "beta2": 0.0}
    zero, grad = torch.zeros(length, device=device), drawn(length, 3, device)
    grad[::7] = 0
    results = []
    for update in (ops.adamw_stochastic_, adamw.stochastic_reference):
        found = []
        for g in (zero, grad):
            tensors = [drawn(length, 0, device, torch.bfloat16), *(torch.zeros_like(zero, dtype=moments) for _ in "mv")]
            update(*tensors, g, seed=seed, offset=offset, **scalars(device, step), **exact)
            found.append(tensors)
        results.append([found[0][0], *found[1][1:]])
    assert same(*results)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_it_stays_within_a_spacing(device: str, moments: torch.dtype, grad_dtype: torch.dtype) -> None:
    tensors, grad = state(3000, device, moments), drawn(3000, 3, device, grad_dtype)
    exact = [t.double() for t in tensors]
    told = scalars(device, grad_scale=0.3, found_inf=0.0)
    adamw.reference(exact[0], *exact, grad, **told, **HYPER)
    ops.adamw_stochastic_(*tensors, grad, seed=1, **told, **HYPER)
    for got, true in zip(tensors, exact, strict=True):
        spacing = 2**-7 if got.dtype == torch.bfloat16 else 2**-20
        assert bool(((got.double() - true).abs() <= spacing * true.abs() + 1e-6).all())


def test_a_shard_takes_the_bits_of_its_place(device: str) -> None:
    whole, grad = state(1000, device, torch.bfloat16), drawn(1000, 3, device)
    parts = [t.clone() for t in whole]
    ops.adamw_stochastic_(*whole, grad, seed=9, offset=50, **scalars(device), **HYPER)
    for begin, end in ((0, 333), (333, 334), (334, 334), (334, 1000)):
        shard = [t[begin:end] for t in parts]
        ops.adamw_stochastic_(*shard, grad[begin:end], seed=9, offset=50 + begin, **scalars(device), **HYPER)
    assert same(parts, whole)


@pytest.mark.parametrize("found", [1.0, math.nan, math.inf])
def test_found_inf_leaves_everything(device: str, found: float) -> None:
    for dtype in MOMENTS:
        tensors, grad = state(300, device, dtype), torch.full((300,), torch.nan, device=device)
        before = [t.clone() for t in tensors]
        ops.adamw_stochastic_(*tensors, grad, seed=1, **scalars(device, found_inf=found), **HYPER)
        assert same(tensors, before)
    master = torch.ones(300, device=device)
    ops.adamw_(
        master, master, *(torch.ones_like(master) for _ in "mv"), grad, **scalars(device, found_inf=found), **HYPER
    )
    assert bool((master == 1).all())


def test_what_is_not_finite_stays_so(device: str) -> None:
    grad = torch.tensor([math.nan, math.inf, 1.0] * 50, device=device)
    results = []
    for update in (ops.adamw_stochastic_, adamw.stochastic_reference):
        tensors = [torch.ones_like(grad).bfloat16(), *(torch.zeros_like(grad).bfloat16() for _ in "mv")]
        update(*tensors, grad, seed=2, **scalars(device), **HYPER)
        results.append(tensors[1:])
    for got, own in zip(*results, strict=True):
        assert torch.equal(got.isfinite(), own.isfinite()) and torch.equal(got.isnan(), own.isnan())


def test_what_it_cannot_take_is_an_error(device: str) -> None:
    flat, told = torch.ones(8, device=device), scalars(device)
    with pytest.raises(ValueError, match="param must be bf16 and both moments fp32, or both bf16"):
        ops.adamw_stochastic_(flat, flat, flat, flat, seed=1, **told, **HYPER)
    gaps = torch.ones(16, device=device)[::2]
    with pytest.raises(ValueError, match=r"strides are \[\(2,\), \(1,\), \(1,\), \(1,\)\]"):
        ops.adamw_stochastic_(gaps.bfloat16().repeat_interleave(2)[::2], flat, flat, flat, seed=1, **told, **HYPER)
