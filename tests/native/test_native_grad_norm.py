"""The C++ gradient norm: the 2x rule against fp64, threads, layouts, and what counts as not finite."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close
from torch import Tensor

from megapre.kernels import grad_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTHS = st.integers(0, 140) | st.sampled_from([4095, 4096, 4097, 40_001])


def drawn(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=4), magnitude=st.sampled_from([1.0, 1e-3, 2.0**-14]))
def test_obeys_the_rule(ops: Any, dtype: torch.dtype, lengths: list[int], magnitude: float) -> None:
    grads = [(drawn(length) * magnitude).to(dtype) for length in lengths]
    norm = ops.grad_norm(grads)
    assert norm.shape == () and norm.dtype == torch.float32
    exact = torch.cat([g.double() for g in grads]).norm()
    close(norm, torch.cat([g.float() for g in grads]).norm(), exact)


def test_tensors_of_several_dtypes_layouts_and_places(ops: Any) -> None:
    whole = drawn(40_001)
    gaps = torch.full((600,), torch.nan)[::2].copy_(whole[:300])
    grads = [
        whole[7:],
        gaps,
        whole[:600].view(20, 30).T,
        drawn(900, torch.bfloat16),
        drawn(50, torch.float64),
        whole[:0],
    ]
    exact = torch.cat([g.double().reshape(-1) for g in grads]).norm()
    assert ops.grad_norm(grads).item() == pytest.approx(exact.item(), rel=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_every_number_of_threads(ops: Any, dtype: torch.dtype) -> None:
    grads, norms = [drawn(1_000_003, dtype), drawn(77, dtype)], []
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        try:
            norms.append(ops.grad_norm(grads))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(length=st.integers(1, 140) | st.sampled_from([4097, 9000]), data=st.data())
def test_one_bad_element_anywhere_shows(ops: Any, dtype: torch.dtype, bad: float, length: int, data: Any) -> None:
    grad = drawn(length, dtype)
    grad[data.draw(st.integers(0, length - 1))] = bad
    norm = ops.grad_norm([grad])
    assert norm.isnan() if math.isnan(bad) else norm == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [3e38, 1e30, 1e19, 1e18, 1e-18, 1e-23, 1e-37])
@pytest.mark.parametrize("length", [1, 100, 4096])
def test_squares_beyond_fp32_do_not_matter(ops: Any, dtype: torch.dtype, value: float, length: int) -> None:
    """The norm is finite where every gradient is, up to where it leaves fp32 itself, and no small one is lost."""
    grad = torch.full((length,), value, dtype=dtype)
    exact = grad.double().norm().item()
    norm = ops.grad_norm([grad, torch.zeros(50, dtype=dtype)]).item()
    assert norm == (math.inf if exact > torch.finfo(torch.float32).max else pytest.approx(exact, rel=1e-6))


def test_nothing_has_no_norm(ops: Any) -> None:
    assert grad_norm.native([]) == 0
    assert ops.grad_norm([torch.zeros(0)]) == 0
    with pytest.raises(TypeError, match="a gradient is Int; supported are fp32, bf16, fp16, fp64"):
        ops.grad_norm([torch.ones(3, dtype=torch.int32)])


@pytest.mark.slow
def test_offsets_beyond_31_bits(ops: Any) -> None:
    """The one element that is not 0 is the last of 2^31 + 1. No memory stands behind the zeros."""
    grad = torch.from_numpy(np.zeros(2**31 + 1, dtype=np.float16))
    grad[-1] = 3
    assert ops.grad_norm([grad]) == 3
