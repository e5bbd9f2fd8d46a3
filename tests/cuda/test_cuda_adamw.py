"""The CUDA AdamW under emulation, beyond tests/forms: one launch, small devices, any order of blocks, errors."""

import emulated
import pytest
import torch
from rule import same
from updated import drawn, state, told


@pytest.mark.parametrize("length", [0, 1, 257, 9001])
def test_an_update_is_one_launch(emulator: emulated.Emulator, length: int) -> None:
    before = emulator.launches()
    emulator.ops.adamw_(torch.zeros(length).bfloat16(), *state(length), drawn(length, 3), *told(scale=0.3))
    assert emulator.launches() == before + (length > 0)
    emulator.ops.adamw_stochastic_(*(t.bfloat16() for t in state(length)), drawn(length, 3), *told(), 1, 0)
    assert emulator.launches() == before + 2 * (length > 0)


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
