"""The C++ AdamW through its Python form, beyond tests/forms: fp64, one tensor for param and master, threads, errors."""

from typing import Any

import pytest
import torch
import updated
from hypothesis import given
from rule import same
from updated import HYPER, LENGTHS, drawn, scalars, state

from megapre.kernels import adamw


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


def test_the_python_forms_are_the_ops(ops: Any) -> None:
    """A parameter that is its own master is written once; keywords go where the ops have them."""
    grad, given, told = drawn(300, 3), scalars(scale=0.3, found=0.0), updated.told(scale=0.3, found=0.0)
    own, apart, wanted = state(300), [torch.zeros(300).bfloat16(), *state(300)], state(300)
    adamw.native(own[0], *own, grad, **given, **HYPER)
    adamw.native(*apart, grad, **given, **HYPER)
    ops.adamw_(None, *wanted, grad, *told)
    assert same(own, wanted) and same(apart, [wanted[0].bfloat16(), *wanted])
    narrow = [t.bfloat16() for t in state(300)]
    expected = [t.clone() for t in narrow]
    adamw.stochastic_native(*narrow, grad, seed=3, offset=5, **given, **HYPER)
    ops.adamw_stochastic_(*expected, grad, *told, 3, 5)
    assert same(narrow, expected)


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
