"""The native forms of AdamW: the 2x rule against fp64, skipping, layouts, random rounding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_forms import Form
from rule import close, same
from torch import Tensor
from updated import HYPER, LENGTHS, drawn, references, scalars, state, told

from megapre.kernels import adamw

DTYPES = {  # of the gradient
    "cpu": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "cuda": [torch.float32, torch.bfloat16, torch.float16],
}


@given(
    param_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    length=LENGTHS,
    scale=st.none() | st.sampled_from([0.25, 0.3]),
    step=st.integers(1, 9),
)
def test_obeys_the_rule(
    form: Form, dtype: torch.dtype, param_dtype: torch.dtype | None, length: int, scale: float | None, step: int
) -> None:
    """Everything at the end of its memory; the gradient is only read."""
    grad, given = drawn(length, 3, dtype), {"scale": scale, "step": float(step)}
    got, gradient = [form.guarded(t) for t in state(length)], form.guarded(grad)
    param = None if param_dtype is None else form.guarded(torch.full((length,), torch.nan, dtype=param_dtype))
    arguments = [form.guarded(t) if isinstance(t, Tensor) else t for t in told(**given)]
    form.ops.adamw_(param, *got, gradient, *arguments)
    assert torch.equal(gradient, grad)
    assert param is None or torch.equal(param, got[0].to(param.dtype))
    results = references(state(length), torch.float32, grad, **given)
    for what, g, own, exact in zip(("master", "exp_avg", "exp_avg_sq"), got, *results, strict=True):
        close(g, own, exact, what)


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16])
def test_sixteen_bit_states_are_computed_in_fp32_and_rounded_once(
    form: Form, dtype: torch.dtype, held: torch.dtype
) -> None:
    grad, start = drawn(257, 3, dtype), [t.to(held) for t in state(257)]
    got = [t.clone() for t in start]
    form.ops.adamw_(None, *got, grad, *told())
    for g, own, exact in zip(got, *references(start, held, grad), strict=True):
        close(g, own, exact)


@pytest.mark.parametrize("found", [1.0, math.nan, math.inf])
def test_found_inf_leaves_everything(form: Form, found: float) -> None:
    tensors, bad = state(300), torch.full((300,), torch.nan)
    param = tensors[0].bfloat16() + 1
    before = [t.clone() for t in (param, *tensors)]
    form.ops.adamw_(param, *tensors, bad, *told(found=found, scale=0.5))
    assert same((param, *tensors), before)
    narrow = [param, *(t.bfloat16() for t in tensors[1:])]
    before = [t.clone() for t in narrow]
    form.ops.adamw_stochastic_(*narrow, bad, *told(found=found), 1, 0)
    assert same(narrow, before)


def test_scalars_of_any_dtype(form: Form) -> None:
    results = []
    for dtype in (torch.float32, torch.float64, torch.int64):
        tensors, (lr, step, scale, found, *rest) = state(200), told(found=0.0, step=7.0, lr=0.25)
        given = lr.double(), step.to(dtype), scale, found.to(dtype)
        form.ops.adamw_(None, *tensors, drawn(200, 3), *given, *rest)
        results.append(tensors)
    assert same(results[0], results[1]) and same(results[0], results[2])


def apart(t: Tensor) -> Tensor:
    return torch.full((2 * len(t),), torch.nan, dtype=t.dtype)[::2].copy_(t)


def off_by_one(t: Tensor) -> Tensor:
    return torch.full((len(t) + 1,), torch.nan, dtype=t.dtype)[1:].copy_(t)


def test_any_layout_gives_the_same_bits(form: Form) -> None:
    plain, grad = [torch.zeros(333).bfloat16(), *state(333)], drawn(333, 3)
    narrow = [t.bfloat16() for t in plain[1:]]
    moved = [[layout(t) for t in (*plain, *narrow)] for layout in (apart, off_by_one)]
    form.ops.adamw_(*plain, grad, *told())
    form.ops.adamw_stochastic_(*narrow, grad, *told(), 3, 0)
    for layout, tensors in zip((apart, off_by_one), moved, strict=True):
        form.ops.adamw_(*tensors[:4], layout(grad), *told())
        form.ops.adamw_stochastic_(*tensors[4:], layout(grad), *told(), 3, 0)
        assert same(tensors, [*plain, *narrow])


def test_an_update_in_place_raises_the_versions(form: Form) -> None:
    tensors = [torch.zeros(9).bfloat16(), *state(9)]
    before = [t._version for t in tensors]
    form.ops.adamw_(*tensors, drawn(9, 3), *told())
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
def test_the_random_bits_are_the_references(
    form: Form, moments: torch.dtype, length: int, offset: int, seed: int, step: int
) -> None:
    exact = {**HYPER, "beta1": 0.0, "beta2": 0.0}
    given = scalars(step=float(step))
    arguments = adamw.Update(**given, **exact).arguments()
    grad = drawn(length, 3)
    grad[::7] = 0
    for g, compared in ((torch.zeros(length), slice(0, 1)), (grad, slice(1, 3))):
        start = [drawn(length, 0, torch.bfloat16), *(torch.zeros(length, dtype=moments) for _ in "mv")]
        got = [form.guarded(t) for t in start]
        form.ops.adamw_stochastic_(*got, g, *arguments, seed, offset)
        adamw.stochastic_reference(*start, g, seed=seed, offset=offset, **given, **exact)
        assert same(got[compared], start[compared])


def test_an_update_rounded_at_random_obeys_the_rule(form: Form, dtype: torch.dtype) -> None:
    """Rounded up or down: within one spacing of bf16 (two half ulps, the ulp of rule.py) of fp64."""
    tensors, grad = [t.bfloat16() for t in state(5000)], drawn(5000, 3, dtype)
    _, exact = references(tensors, torch.bfloat16, grad, scale=0.3)
    form.ops.adamw_stochastic_(*tensors, grad, *told(scale=0.3), 1, 0)
    for got, true in zip(tensors, exact, strict=True):
        assert bool(((got.double() - true).abs() <= 2**-7 * true.abs() + 1e-6).all())


def test_a_shard_takes_the_bits_of_its_place(form: Form) -> None:
    whole, grad = [t.bfloat16() for t in state(1000)], drawn(1000, 3)
    parts = [t.clone() for t in whole]
    form.ops.adamw_stochastic_(*whole, grad, *told(), 9, 50)
    for begin, end in ((0, 333), (333, 334), (334, 1000)):
        shard = [t[begin:end] for t in parts]
        form.ops.adamw_stochastic_(*shard, grad[begin:end], *told(), 9, 50 + begin)
    assert same(parts, whole)


def test_what_is_not_finite_is_not_rounded_to_a_number(form: Form) -> None:
    grad = torch.tensor([math.nan, math.inf, 1.0] * 50)
    tensors = [torch.ones(150).bfloat16(), torch.zeros(150).bfloat16(), torch.zeros(150).bfloat16()]
    form.ops.adamw_stochastic_(*tensors, grad, *told(), 2, 0)
    for t in tensors[1:]:
        assert t[::3].isnan().all() and (t[1::3] == math.inf).all() and t[2::3].isfinite().all()
