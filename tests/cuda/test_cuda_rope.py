"""The CUDA rope under emulation, beyond tests/forms: blocks and threads, positions outside, any order of warps."""

import emulated
import pytest
import torch
from rotated import drawn, tables
from rule import same


def test_a_part_that_is_only_moved_keeps_its_bits(emulator: emulated.Emulator) -> None:
    q, k = (drawn(i, 1, 3, 2, 16, dtype=torch.float32) for i in range(2))
    v = torch.tensor([torch.inf, -0.0, torch.nan, 1.0]).repeat(1, 3, 1, 4)
    got = emulator.ops.rope_qkv_backward(q, k, v, *tables(8), None, None, False)[:, :, 4:]
    assert torch.equal(got.view(torch.int32), v.view(torch.int32))


def test_many_heads_and_few(emulator: emulated.Emulator) -> None:
    """More threads a token than a block has; and blocks of many tokens, the last with fewer."""
    for heads, half, length in ((150, 64, 2), (1, 8, 333)):
        q, k = (drawn(i, 1, length, heads, 2 * half, dtype=torch.bfloat16) for i in range(2))
        where = (*tables(half, length), None, None, False, False)
        expected = torch.ops.megapre.rope(q, k[:, :, :1], *where)
        assert same(emulator.ops.rope(emulator.guarded(q), emulator.guarded(k[:, :, :1]), *where), expected)


def test_any_order_of_warps_gives_the_same_rotation(emulator: emulated.Emulator) -> None:
    q, k, v = (drawn(i, 2, 9, n, 64, dtype=torch.bfloat16) for i, n in enumerate((5, 2, 2)))
    where = (*tables(32), None, torch.tensor([0, 3, 18], dtype=torch.int32), True)
    expected = emulator.ops.rope_qkv_backward(q, k, v, *where)
    for seed in range(1, 5):
        emulator.schedule(seed)
        assert torch.equal(emulator.ops.rope_qkv_backward(q, k, v, *where), expected)
        qkv = torch.cat((q, k, v), 2)
        emulator.ops.rope_(qkv, 7, *where)
        assert same([qkv[:, :, :5], qkv[:, :, 5:7]], emulator.ops.rope(q, k, *where, False))


def test_a_position_outside_the_tables_is_not_read(emulator: emulated.Emulator) -> None:
    q, k = (drawn(i, 1, 4, 2, 16, dtype=torch.float32) for i in range(2))
    cos, sin = (emulator.guarded(t) for t in tables(8, 3))
    q_out, k_out = emulator.ops.rope(q, k, cos, sin, torch.tensor([[2, -1, 3, 2**40]]), None, False, False)
    for got in (q_out, k_out):
        assert got[:, 0].isfinite().all() and got[:, 1:].isnan().all()
    for bounds in ([0, 4], [9, 10], [5, 1, 0]):  # too long a document; no token's; not in order
        turned, _ = emulator.ops.rope(q, k, cos, sin, None, torch.tensor(bounds, dtype=torch.int32), False, False)
        assert turned[:, 3].isnan().all() == (bounds != [5, 1, 0])


def test_what_cannot_be_rotated_is_said(emulator: emulated.Emulator) -> None:
    ops, q, (cos, sin) = emulator.ops, torch.randn(1, 4, 2, 8), tables(4, 4)
    with pytest.raises(ValueError, match=r"q is Float \[4, 2, 8\]; \[batch, sequence, heads, head_dim\] is needed"):
        ops.rope(q[0], q[0], cos, sin, None, None, False, False)
    with pytest.raises(ValueError, match="they differ only in heads"):
        ops.rope(q, q[:, :3], cos, sin, None, None, False, False)
    with pytest.raises(ValueError, match="with head_dim 8"):
        ops.rope(q, q, cos[:, :3], sin[:, :3], None, None, False, False)
    with pytest.raises(ValueError, match="4 positions are asked for, the tables hold 3"):
        ops.rope(q, q, cos[:3], sin[:3], None, None, False, False)
    with pytest.raises(ValueError, match=r"positions are Int \[1, 4\]; one int64 for each token \[1, 4\]"):
        ops.rope(q, q, cos, sin, torch.zeros(1, 4, dtype=torch.int32), None, False, False)
    with pytest.raises(ValueError, match="both given"):
        bounds = torch.tensor([0, 4], dtype=torch.int32)
        ops.rope(q, q, cos, sin, torch.zeros(1, 4, dtype=torch.int64), bounds, False, False)
    with pytest.raises(ValueError, match=r"cu_seqlens is Long \[2\]; \[documents \+ 1\] int32"):
        ops.rope(q, q, cos, sin, None, torch.tensor([0, 4]), False, False)
    with pytest.raises(ValueError, match="3 heads are to be rotated of 2"):
        ops.rope_(q, 3, cos, sin, None, None, False)
    with pytest.raises(ValueError, match="rows must not overlap"):
        ops.rope_(q[:, :, :1].expand(1, 4, 2, 8), 2, cos, sin, None, None, False)
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take fp32, bf16 and fp16"):
        ops.rope(q.double(), q.double(), cos, sin, None, None, False, False)
