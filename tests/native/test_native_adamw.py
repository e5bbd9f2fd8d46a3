"""The C++ AdamW: the 2x rule against fp64, every dtype of gradient and parameter, skipping, random rounding."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor

from megapre.kernels import adamw

HYPER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One vector is 8 to 32 elements, a group of random numbers 128, a thread's share a multiple of 4,096.
LENGTHS = st.integers(0, 140) | st.sampled_from([255, 256, 257, 1000, 4096, 9001])


def drawn(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scalars(lr: float = 1e-2, step: float = 3.0, scale: float | None = None, found: float | None = None) -> Any:
    made = {"lr": lr, "step": step, "grad_scale": scale, "found_inf": found}
    return {key: None if value is None else torch.tensor(value) for key, value in made.items()}


def state(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Master and moments as they are in the middle of a run."""
    return [drawn(length, 0, dtype), drawn(length, 1, dtype) / 8, drawn(length, 2, dtype).square() / 8]


@pytest.mark.parametrize("grad_dtype", DTYPES)
@given(
    param_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    length=LENGTHS,
    scale=st.none() | st.sampled_from([0.25, 0.3]),
    step=st.integers(1, 9),
)
def test_obeys_the_rule(
    ops: Any, param_dtype: torch.dtype | None, grad_dtype: torch.dtype, length: int, scale: float | None, step: int
) -> None:
    grad, given = drawn(length, 3, grad_dtype), scalars(scale=scale, step=float(step))
    results = []
    wide = (adamw.reference, torch.float64)
    for update, dtype in ((adamw.native, torch.float32), (adamw.reference, torch.float32), wide):
        master, *moments = (t.to(dtype) for t in state(length))
        param = master if param_dtype is None else torch.full((length,), torch.nan, dtype=param_dtype)
        before = grad.clone()
        update(param, master, *moments, grad, **given, **HYPER)
        assert torch.equal(grad, before)
        assert torch.equal(param, master.to(param.dtype))
        results.append((master, *moments))
    for what, got, own, exact in zip(("master", "exp_avg", "exp_avg_sq"), *results, strict=True):
        close(got, own, exact, what)


@given(length=LENGTHS)
def test_fp64_is_computed_in_fp64(ops: Any, length: int) -> None:
    results = []
    for update in (adamw.native, adamw.reference):
        tensors = state(length, torch.float64)
        param = torch.full((length,), torch.nan)
        update(param, *tensors, drawn(length, 3, torch.float64), **scalars(), **HYPER)
        results.append([param, *tensors])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6 if got.dtype == torch.float32 else 1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_states_are_computed_in_fp32_and_rounded_once(ops: Any, dtype: torch.dtype) -> None:
    results = []
    for update, wider in ((adamw.native, dtype), (adamw.reference, dtype), (adamw.reference, torch.float64)):
        tensors = [t.to(dtype).to(wider) for t in state(257)]
        update(tensors[0], *tensors, drawn(257, 3), **scalars(), **HYPER)
        results.append(tensors)
    for got, own, exact in zip(*results, strict=True):
        close(got, own, exact)


@pytest.mark.parametrize("found", [1.0, math.nan, math.inf])
def test_found_inf_leaves_everything(ops: Any, found: float) -> None:
    tensors = state(300)
    param = tensors[0].bfloat16() + 1
    before = [t.clone() for t in (param, *tensors)]
    adamw.native(param, *tensors, torch.full((300,), torch.nan), **scalars(found=found, scale=0.5), **HYPER)
    assert same((param, *tensors), before)
    narrow = [param, *(t.bfloat16() for t in tensors[1:])]
    before = [t.clone() for t in narrow]
    adamw.stochastic_native(*narrow, torch.full((300,), torch.nan), seed=1, **scalars(found=found), **HYPER)
    assert same(narrow, before)


@pytest.mark.parametrize("length", [70_001, 4_200_007])
def test_threads_do_not_change_a_bit(ops: Any, length: int) -> None:
    """The longer parameter is written past the caches."""
    grad, results = drawn(length, 3), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            for _ in range(2):
                tensors = state(length)
                param = torch.full((length,), torch.nan, dtype=torch.bfloat16)
                adamw.native(param, *tensors, grad, **scalars(), **HYPER)
                narrow = [t.bfloat16() for t in tensors]
                adamw.stochastic_native(*narrow, grad, seed=5, offset=77, **scalars(), **HYPER)
                results.append([param, *tensors, *narrow])
        finally:
            torch.set_num_threads(1)
    assert all(same(result, results[0]) for result in results)
    assert torch.equal(results[0][0], results[0][1].bfloat16())


def test_any_layout_gives_the_same_bits(ops: Any) -> None:
    def apart(t: Tensor) -> Tensor:
        return torch.full((2 * len(t),), torch.nan, dtype=t.dtype)[::2].copy_(t)

    plain, grad = [torch.zeros(333).bfloat16(), *state(333)], drawn(333, 3)
    gaps = [apart(t) for t in plain]
    adamw.native(*plain, grad, **scalars(), **HYPER)
    adamw.native(*gaps, apart(grad), **scalars(), **HYPER)
    assert same(gaps, plain)
    narrow = [t.bfloat16() for t in plain[1:]]
    gaps = [apart(t) for t in narrow]
    adamw.stochastic_native(*narrow, grad, seed=3, **scalars(), **HYPER)
    adamw.stochastic_native(*gaps, apart(grad), seed=3, **scalars(), **HYPER)
    assert same(gaps, narrow)


# Random rounding. What is rounded is made exact, so that bits can be compared: with beta = 0 the moments are g and g^2,
# and with g = 0 the parameter is p (1 - lr weight_decay), one fp32 product.


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@given(
    length=LENGTHS,
    offset=st.sampled_from([0, 1, 100, 128, 4095, 2**32 * 8 - 3, 2**40 + 17]),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(1, 2**24),
)
def test_the_random_bits_are_the_references(
    ops: Any, moments: torch.dtype, length: int, offset: int, seed: int, step: int
) -> None:
    exact = {**HYPER, "beta1": 0.0, "beta2": 0.0}
    zero, grad = torch.zeros(length), drawn(length, 3)
    grad[::7] = 0
    results = []
    for update in (adamw.stochastic_native, adamw.stochastic_reference):
        found = []
        for g in (zero, grad):
            tensors = [drawn(length, 0, torch.bfloat16), *(torch.zeros(length, dtype=moments) for _ in "mv")]
            update(*tensors, g, seed=seed, offset=offset, **scalars(step=float(step)), **exact)
            found.append(tensors)
        results.append([found[0][0], *found[1][1:]])
    assert same(*results)


def test_stochastic_update_obeys_the_rule(ops: Any) -> None:
    """Rounded up or down: within one spacing of bf16 (two half ulps, the ulp of rule.py) of fp64."""
    tensors, grad = [t.bfloat16() for t in state(5000)], drawn(5000, 3)
    exact = [t.double() for t in tensors]
    adamw.reference(exact[0], *exact, grad, **scalars(scale=0.3), **HYPER)
    adamw.stochastic_native(*tensors, grad, seed=1, **scalars(scale=0.3), **HYPER)
    for got, true in zip(tensors, exact, strict=True):
        assert bool(((got.double() - true).abs() <= 2**-7 * true.abs() + 1e-6).all())


def test_a_shard_takes_the_bits_of_its_place(ops: Any) -> None:
    whole, grad = [t.bfloat16() for t in state(1000)], drawn(1000, 3)
    parts = [t.clone() for t in whole]
    adamw.stochastic_native(*whole, grad, seed=9, offset=50, **scalars(), **HYPER)
    for begin, end in ((0, 333), (333, 334), (334, 1000)):
        shard = [t[begin:end] for t in parts]
        adamw.stochastic_native(*shard, grad[begin:end], seed=9, offset=50 + begin, **scalars(), **HYPER)
    assert same(parts, whole)


def test_what_is_not_finite_stays_so(ops: Any) -> None:
    grad = torch.tensor([math.nan, math.inf, 1.0] * 50)
    for update in (adamw.stochastic_native, adamw.stochastic_reference):
        tensors = [torch.ones(150).bfloat16(), torch.zeros(150).bfloat16(), torch.zeros(150).bfloat16()]
        update(*tensors, grad, seed=2, **scalars(), **HYPER)
        for t in tensors[1:]:
            assert t[::3].isnan().all() and (t[1::3] == math.inf).all() and t[2::3].isfinite().all()


def test_errors_have_numbers(ops: Any) -> None:
    flat, five = torch.zeros(4), torch.zeros(5)
    more = (torch.tensor(0.1), torch.tensor(1.0), None, None, 0.9, 0.95, 1e-8, 0.1)
    with pytest.raises(ValueError, match=r"adamw_: grad has shape \[5\].*length of the first, \[4\]"):
        ops.adamw_(None, flat, flat, flat, five, *more)
    with pytest.raises(ValueError, match=r"param has shape \[2, 2\]"):
        ops.adamw_(flat.view(2, 2), flat, flat, flat, flat, *more)
    with pytest.raises(TypeError, match="grad is Int; supported are fp32, bf16, fp16, fp64"):
        ops.adamw_(None, flat, flat, flat, flat.int(), *more)
    with pytest.raises(TypeError, match="param is Double, but its master Float"):
        ops.adamw_(flat.double(), flat, flat, flat, flat, *more)
    with pytest.raises(ValueError, match=r"lr has shape \[1\]; it must be 0-dim"):
        ops.adamw_(None, flat, flat, flat, flat, torch.ones(1), *more[1:])
    with pytest.raises(ValueError, match="master and moments must share a dtype; they are Float and Double"):
        ops.adamw_(None, flat, flat.double(), flat.double(), flat, *more)
    with pytest.raises(TypeError, match="param is Float; it must be bf16"):
        ops.adamw_stochastic_(flat, flat, flat, flat, *more, 1, 0)
    with pytest.raises(ValueError, match="offset = -1"):
        ops.adamw_stochastic_(flat.bfloat16(), flat, flat, flat, *more, 1, -1)
    with pytest.raises(ValueError, match=r"param must be bf16 and both moments fp32, or both bf16"):
        adamw.stochastic_native(flat, flat, flat, flat, seed=1, **scalars(), **HYPER)
