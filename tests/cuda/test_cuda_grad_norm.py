"""The CUDA gradient norm under emulation: the 2x rule against fp64, layouts, what counts as not finite, one order."""

import math

import emulated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = 32768
LENGTHS = st.integers(0, 140) | st.sampled_from([2048, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])


def drawn(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=4), magnitude=st.sampled_from([1.0, 1e-3, 2.0**-14]))
def test_grad_norm_obeys_the_rule(
    loaded_emulator: emulated.Emulator, dtype: torch.dtype, lengths: list[int], magnitude: float
) -> None:
    grads = [(drawn(length) * magnitude).to(dtype) for length in lengths]
    norm = loaded_emulator.ops.grad_norm([loaded_emulator.guarded(grad) for grad in grads])
    assert norm.shape == () and norm.dtype == torch.float32
    exact = torch.cat([g.double() for g in grads]).norm()
    close(norm, torch.cat([g.float() for g in grads]).norm(), exact)


def test_gradients_of_several_dtypes_layouts_and_places(emulator: emulated.Emulator) -> None:
    whole = drawn(40_001)
    gaps = torch.full((600,), torch.nan)[::2].copy_(whole[:300])
    grads = [
        whole[7:],
        gaps,
        whole[:600].view(20, 30).T,
        drawn(900, torch.bfloat16)[1:],
        whole[:0],
        drawn(9, torch.float16),
    ]
    exact = torch.cat([g.double().reshape(-1) for g in grads]).norm()
    before = emulator.launches()
    assert emulator.ops.grad_norm(grads).item() == pytest.approx(exact.item(), rel=2e-7)
    assert emulator.launches() == before + 2


def test_more_tensors_than_a_table_holds(emulator: emulated.Emulator) -> None:
    grads = [drawn(1 + i % 5) for i in range(300)] + [drawn(CHUNK + 5)]
    before = emulator.launches()
    norm = emulator.ops.grad_norm(grads)
    assert emulator.launches() == before + 4
    assert norm.item() == pytest.approx(torch.cat([g.double() for g in grads]).norm().item(), rel=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_wherever_a_gradient_lies(emulator: emulated.Emulator, dtype: torch.dtype) -> None:
    grad = drawn(CHUNK + 4001, dtype)
    expected = emulator.ops.grad_norm([grad])
    shifted = torch.full((len(grad) + 1,), torch.nan, dtype=dtype)[1:].copy_(grad)
    for seed in range(4):
        emulator.schedule(seed)
        assert torch.equal(emulator.ops.grad_norm([grad]), expected)
        assert torch.equal(emulator.ops.grad_norm([shifted]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("length", [1, 140, CHUNK, CHUNK + 3])
@pytest.mark.parametrize("where", [0.0, 0.6, 1.0])
def test_one_bad_element_shows(
    emulator: emulated.Emulator, dtype: torch.dtype, bad: float, length: int, where: float
) -> None:
    grad = drawn(length, dtype)
    grad[int(where * (length - 1))] = bad
    norm = emulator.ops.grad_norm([grad])
    assert norm.isnan() if math.isnan(bad) else norm == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [3e38, 1e30, 1e19, 1e18, 1e-18, 1e-23, 1e-37, -0.0])
@pytest.mark.parametrize("length", [1, 100, CHUNK])
def test_squares_beyond_fp32_do_not_matter(
    emulator: emulated.Emulator, dtype: torch.dtype, value: float, length: int
) -> None:
    grad = torch.full((length,), value, dtype=dtype)
    exact = grad.double().norm().item()
    norm = emulator.ops.grad_norm([grad, torch.zeros(50, dtype=dtype)]).item()
    assert norm == (math.inf if exact > torch.finfo(torch.float32).max else pytest.approx(exact, rel=1e-6))


def test_nothing_has_no_norm(emulator: emulated.Emulator) -> None:
    assert emulator.ops.grad_norm([torch.zeros(0)]) == 0
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take fp32, bf16 and fp16"):
        emulator.ops.grad_norm([torch.ones(3).double()])
