"""The C++ rope, beyond tests/forms: repeatability, positions outside, errors."""

from typing import Any

import pytest
import torch
from rotated import drawn, tables
from rule import same
from torch import Tensor


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise_for_any_number_of_threads(ops: Any, threads: int) -> None:
    q, k = drawn(0, 2, 300, 6, 64, dtype=torch.float32), drawn(1, 2, 300, 2, 64, dtype=torch.float32)
    where = (*tables(32, 300), None, None, False)
    expected = [*ops.rope(q, k, *where, False), ops.rope_qkv_backward(q, k, k, *where)]
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert same([*ops.rope(q, k, *where, False), ops.rope_qkv_backward(q, k, k, *where)], expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("position", [-1, 30, 2**40])
def test_a_position_outside_the_tables_changes_nothing(ops: Any, position: int) -> None:
    qkv, positions = torch.ones(2, 3, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    positions[1, 2] = position
    where = (*tables(4), positions, None, False)
    for call in (lambda: ops.rope(qkv, qkv, *where, False), lambda: ops.rope_(qkv, 2, *where)):
        with pytest.raises(ValueError, match=rf"position {position} at \[1, 2\] lies outside \[0, 30\)"):
            call()
    assert qkv.eq(1).all()


def test_errors_have_numbers(ops: Any) -> None:
    cos, sin = tables(4, 6)
    q = torch.zeros(2, 4, 3, 8)

    def documents(*bounds: int) -> Tensor:
        return torch.tensor(bounds, dtype=torch.int32)

    def rope(q: Tensor, k: Tensor, **given: Any) -> None:
        settings = {"cos": cos, "sin": sin, "positions": None, "cu_seqlens": None, "interleaved": False}
        ops.rope(q, k, **{**settings, **given}, inverse=False)

    positions = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="9 positions are asked for, the tables hold 6"):
        rope(torch.zeros(1, 9, 1, 8), torch.zeros(1, 9, 1, 8))
    with pytest.raises(ValueError, match=r"k is .*\[2, 5, 3, 8\] beside .*\[2, 4, 3, 8\]; they differ only in heads"):
        rope(q, torch.zeros(2, 5, 3, 8))
    with pytest.raises(ValueError, match="they differ only in heads"):
        rope(q, q.bfloat16())
    with pytest.raises(ValueError, match=r"\[6, 4\].* with head_dim 10"):
        rope(torch.zeros(2, 4, 3, 10), torch.zeros(2, 4, 3, 10))
    with pytest.raises(ValueError, match="both given"):
        rope(q, q, positions=positions, cu_seqlens=documents(0, 8))
    with pytest.raises(ValueError, match=r"positions are \[2, 3\]; one for each token \[2, 4\]"):
        rope(q, q, positions=positions[:, :3])
    with pytest.raises(TypeError, match="positions are Int, not int64"):
        rope(q, q, positions=positions.int())
    with pytest.raises(TypeError, match="cu_seqlens are Long, not int32"):
        rope(q, q, cu_seqlens=documents(0, 8).long())
    for bounds in ((0, 7), (1, 8), (0, 5, 4, 8)):
        with pytest.raises(ValueError, match=r"must rise from 0 to B\*S = 8"):
            rope(q, q, cu_seqlens=documents(*bounds))
    with pytest.raises(ValueError, match=r"cu_seqlens is \[1\]"):
        rope(q, q, cu_seqlens=documents(0))
    with pytest.raises(ValueError, match="longest document has 8 positions, the tables hold 6"):
        rope(q.view(1, 8, 3, 8), q.view(1, 8, 3, 8), cu_seqlens=documents(0, 8))
    with pytest.raises(TypeError, match="supported are fp32, bf16, fp16, fp64"):
        rope(q.int(), q.int())
    with pytest.raises(ValueError, match="4 heads are to be rotated of 3"):
        ops.rope_(q, 4, cos, sin, None, None, False)
    with pytest.raises(ValueError, match="must be neighbours"):
        ops.rope_(q.transpose(2, 3).contiguous().transpose(2, 3), 3, cos, sin, None, None, False)
    with pytest.raises(ValueError, match="must not overlap"):
        ops.rope_(q[:, :, :1].expand(2, 4, 3, 8), 3, cos, sin, None, None, False)
    assert not q.any()
