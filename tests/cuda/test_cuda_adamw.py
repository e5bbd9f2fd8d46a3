"""The CUDA AdamW under emulation: the 2x rule against fp64, skipping, layouts, the CPU's random bits, one result."""

import math
from typing import Any

import emulated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor

from megapre.kernels import adamw

HYPER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A thread has four elements of a group of 128 and the four that are 64 further on; a block has 2,048.
LENGTHS = st.integers(0, 140) | st.sampled_from([255, 256, 257, 1000, 4096, 9001])


def drawn(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scalars(lr: float = 1e-2, step: float = 3.0, scale: float | None = None, found: float | None = None) -> Any:
    made = {"lr": lr, "step": step, "grad_scale": scale, "found_inf": found}
    return {key: None if value is None else torch.tensor(value) for key, value in made.items()}


def state(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Master and moments as they are in the middle of a run."""
    return [drawn(length, 0, dtype), drawn(length, 1, dtype) / 8, drawn(length, 2, dtype).square() / 8]


def told(**given: Any) -> list[Any]:
    return adamw.Update(**scalars(**given), **HYPER).arguments()


@pytest.mark.parametrize("grad_dtype", DTYPES)
@given(
    param_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    length=LENGTHS,
    scale=st.none() | st.sampled_from([0.25, 0.3]),
    step=st.integers(1, 9),
)
def test_adamw_obeys_the_rule(
    loaded_emulator: emulated.Emulator,
    param_dtype: torch.dtype | None,
    grad_dtype: torch.dtype,
    length: int,
    scale: float | None,
    step: int,
) -> None:
    grad, given, guarded = drawn(length, 3, grad_dtype), scalars(scale=scale, step=float(step)), loaded_emulator.guarded
    got = [guarded(t) for t in state(length)]
    param = None if param_dtype is None else guarded(torch.full((length,), torch.nan, dtype=param_dtype))
    arguments = [guarded(t) if isinstance(t, Tensor) else t for t in adamw.Update(**given, **HYPER).arguments()]
    before = loaded_emulator.launches()
    loaded_emulator.ops.adamw_(param, *got, guarded(grad), *arguments)
    assert loaded_emulator.launches() == before + (length > 0)
    assert param is None or torch.equal(param, got[0].to(param.dtype))
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = [t.to(dtype) for t in state(length)]
        adamw.reference(tensors[0], *tensors, grad, **given, **HYPER)
        results.append(tensors)
    for what, g, own, exact in zip(("master", "exp_avg", "exp_avg_sq"), got, *results, strict=True):
        close(g, own, exact, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_sixteen_bit_states_are_rounded_once(
    emulator: emulated.Emulator, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    grad = drawn(257, 3, grad_dtype)
    got = [t.to(dtype) for t in state(257)]
    emulator.ops.adamw_(None, *got, grad, *told())
    results = []
    for wider in (dtype, torch.float64):
        tensors = [t.to(dtype).to(wider) for t in state(257)]
        adamw.reference(tensors[0], *tensors, grad, **scalars(), **HYPER)
        results.append(tensors)
    for g, own, exact in zip(got, *results, strict=True):
        close(g, own, exact)


@pytest.mark.parametrize("found", [1.0, math.nan, math.inf])
def test_a_flag_leaves_everything(emulator: emulated.Emulator, found: float) -> None:
    tensors, bad = state(300), torch.full((300,), torch.nan)
    param = tensors[0].bfloat16() + 1
    before = [t.clone() for t in (param, *tensors)]
    emulator.ops.adamw_(param, *tensors, bad, *told(found=found, scale=0.5))
    assert same((param, *tensors), before)
    narrow = [param, *(t.bfloat16() for t in tensors[1:])]
    before = [t.clone() for t in narrow]
    emulator.ops.adamw_stochastic_(*narrow, bad, *told(found=found), 1, 0)
    assert same(narrow, before)


def test_scalars_of_any_dtype(emulator: emulated.Emulator) -> None:
    results = []
    for dtype in (torch.float32, torch.float64, torch.int64):
        tensors, (lr, step, scale, found, *rest) = state(200), told(found=0.0, step=7.0, lr=0.25)
        given = lr.double(), step.to(dtype), scale, found.to(dtype)
        emulator.ops.adamw_(None, *tensors, drawn(200, 3), *given, *rest)
        results.append(tensors)
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_any_order_of_blocks_gives_the_same_state(emulator: emulated.Emulator, multiprocessors: int) -> None:
    """On a small device a thread walks over several groups."""
    grad, results = drawn(70_001, 3), []
    for seed in range(3):
        emulator.device(multiprocessors=multiprocessors)
        emulator.schedule(seed)
        tensors, param = state(70_001), torch.full((70_001,), torch.nan, dtype=torch.bfloat16)
        emulator.ops.adamw_(param, *tensors, grad, *told())
        narrow = [t.bfloat16() for t in tensors]
        emulator.ops.adamw_stochastic_(*narrow, grad, *told(), 5, 77)
        results.append([param, *tensors, *narrow])
    assert all(same(result, results[0]) for result in results)
    assert torch.equal(results[0][0], results[0][1].bfloat16())


def test_flat_state_of_any_layout_gives_the_same_bits(emulator: emulated.Emulator) -> None:
    def apart(t: Tensor) -> Tensor:
        return torch.full((2 * len(t),), torch.nan, dtype=t.dtype)[::2].copy_(t)

    def off_by_one(t: Tensor) -> Tensor:
        return torch.full((len(t) + 1,), torch.nan, dtype=t.dtype)[1:].copy_(t)

    plain, grad = [torch.zeros(333).bfloat16(), *state(333)], drawn(333, 3)
    narrow = [t.bfloat16() for t in plain[1:]]
    moved = [[layout(t) for t in (*plain, *narrow)] for layout in (apart, off_by_one)]
    emulator.ops.adamw_(*plain, grad, *told())
    emulator.ops.adamw_stochastic_(*narrow, grad, *told(), 3, 0)
    for layout, tensors in zip((apart, off_by_one), moved, strict=True):
        emulator.ops.adamw_(*tensors[:4], layout(grad), *told())
        emulator.ops.adamw_stochastic_(*tensors[4:], layout(grad), *told(), 3, 0)
        assert same(tensors, [*plain, *narrow])


def test_an_update_in_place_raises_the_versions(emulator: emulated.Emulator) -> None:
    tensors = [torch.zeros(9).bfloat16(), *state(9)]
    before = [t._version for t in tensors]
    emulator.ops.adamw_(*tensors, drawn(9, 3), *told())
    assert all(t._version > version for t, version in zip(tensors, before, strict=True))


# Random rounding. What is rounded is made exact, so that bits can be compared: with beta = 0 the moments are g and g^2,
# and with g = 0 the parameter is p (1 - lr weight_decay), one fp32 product.


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@given(
    length=LENGTHS,
    offset=st.sampled_from([0, 1, 4, 100, 128, 4095, 2**32 * 8 - 4, 2**32 * 8 - 3, 2**40 + 17]),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(1, 2**24),
)
def test_the_random_bits_are_those_of_the_cpu(
    loaded_emulator: emulated.Emulator, moments: torch.dtype, length: int, offset: int, seed: int, step: int
) -> None:
    exact = {**HYPER, "beta1": 0.0, "beta2": 0.0}
    arguments = adamw.Update(**scalars(step=float(step)), **exact).arguments()
    grad = drawn(length, 3)
    grad[::7] = 0
    for g, compared in ((torch.zeros(length), slice(0, 1)), (grad, slice(1, 3))):
        results = []
        for ops in (loaded_emulator.ops, torch.ops.megapre):
            tensors = [drawn(length, 0, torch.bfloat16), *(torch.zeros(length, dtype=moments) for _ in "mv")]
            tensors = [loaded_emulator.guarded(t) for t in tensors]
            ops.adamw_stochastic_(*tensors, g, *arguments, seed, offset)
            results.append(tensors[compared])
        assert same(*results)


@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_an_update_rounded_at_random_obeys_the_rule(emulator: emulated.Emulator, grad_dtype: torch.dtype) -> None:
    """Rounded up or down: within one spacing of bf16 (two half ulps, the ulp of rule.py) of fp64."""
    tensors, grad = [t.bfloat16() for t in state(5000)], drawn(5000, 3, grad_dtype)
    exact = [t.double() for t in tensors]
    adamw.reference(exact[0], *exact, grad, **scalars(scale=0.3), **HYPER)
    emulator.ops.adamw_stochastic_(*tensors, grad, *told(scale=0.3), 1, 0)
    for got, true in zip(tensors, exact, strict=True):
        assert bool(((got.double() - true).abs() <= 2**-7 * true.abs() + 1e-6).all())


def test_a_shard_takes_the_bits_of_its_own_place(emulator: emulated.Emulator) -> None:
    whole, grad = [t.bfloat16() for t in state(1000)], drawn(1000, 3)
    parts = [t.clone() for t in whole]
    emulator.ops.adamw_stochastic_(*whole, grad, *told(), 9, 50)
    for begin, end in ((0, 333), (333, 334), (334, 1000)):
        shard = [t[begin:end] for t in parts]
        emulator.ops.adamw_stochastic_(*shard, grad[begin:end], *told(), 9, 50 + begin)
    assert same(parts, whole)


def test_what_is_not_finite_is_not_rounded_to_a_number(emulator: emulated.Emulator) -> None:
    tensors = [torch.ones(150).bfloat16(), torch.zeros(150).bfloat16(), torch.zeros(150).bfloat16()]
    emulator.ops.adamw_stochastic_(*tensors, torch.tensor([math.nan, math.inf, 1.0] * 50), *told(), 2, 0)
    for t in tensors[1:]:
        assert t[::3].isnan().all() and (t[1::3] == math.inf).all() and t[2::3].isfinite().all()


def test_what_cannot_be_updated_is_said(emulator: emulated.Emulator) -> None:
    ops, flat, (lr, *more) = emulator.ops, torch.zeros(4), told()
    with pytest.raises(ValueError, match=r"adamw_: grad is Float \[5\].*length of the first, Float \[4\]"):
        ops.adamw_(None, flat, flat, flat, torch.zeros(5), lr, *more)
    with pytest.raises(ValueError, match=r"param is Float \[2, 2\]"):
        ops.adamw_(flat.view(2, 2), flat, flat, flat, flat, lr, *more)
    with pytest.raises(ValueError, match=r"lr is Float \[1\]; it must be 0-dim"):
        ops.adamw_(None, flat, flat, flat, flat, lr[None], *more)
    with pytest.raises(ValueError, match="master and moments must share a dtype"):
        ops.adamw_(None, flat, flat.bfloat16(), flat.bfloat16(), flat, lr, *more)
    with pytest.raises(ValueError, match="both moments must share a dtype"):
        ops.adamw_(None, flat, flat, flat.bfloat16(), flat, lr, *more)
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take fp32, bf16 and fp16"):
        ops.adamw_(None, flat, flat, flat, flat.double(), lr, *more)
    with pytest.raises(ValueError, match=r"param is Float \[4\]; it must be bf16"):
        ops.adamw_stochastic_(flat, flat, flat, flat, lr, *more, 1, 0)
    with pytest.raises(ValueError, match="they must be fp32 or bf16"):
        ops.adamw_stochastic_(flat.bfloat16(), flat.half(), flat.half(), flat, lr, *more, 1, 0)
    with pytest.raises(ValueError, match="offset = -1"):
        ops.adamw_stochastic_(flat.bfloat16(), flat, flat, flat, lr, *more, 1, -1)
