"""CUDA attention for sm_80 and sm_90a, emulated, beyond tests/forms: head dims, stages, any order of warps, errors."""

import emulated
import pytest
import torch
from attended import attend, drawn, guarded, obeys, qkv
from rule import same

DTYPES = [torch.bfloat16, torch.float16]
# The capability and head dims that its own kernels take; an sm_90 has those for sm_80 for the smaller.
HEAD_DIMS = [(80, dim) for dim in (8, 24, 32, 64, 72, 96, 104, 128, 136, 192, 256)]
HEAD_DIMS += [(90, dim) for dim in (40, 64, 72, 128, 136, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("capability", "dim"), HEAD_DIMS)
def test_every_head_dim(emulator: emulated.Emulator, dtype: torch.dtype, capability: int, dim: int) -> None:
    """Those that fill their tiles, and those that are filled up to them; over more than one tile of both sides."""
    emulator.device(capability=capability)
    obeys(guarded(emulator), *qkv(1, 134, 140, 2, 1, dim, dtype), cu_seqlens=None, window=100)


@pytest.mark.parametrize("dim", [64, 128, 136])
@pytest.mark.parametrize("documents", [False, True])
def test_stages_of_sm90_go_around(emulator: emulated.Emulator, dim: int, documents: bool) -> None:
    """Five tiles of keys, ten of queries and two heads a group: every barrier is in its third phase at least."""
    cu_seqlens = torch.tensor([0, 30, 600], dtype=torch.int32) if documents else None
    emulator.schedule(1)
    obeys(guarded(emulator), *qkv(1, 600, 600, 2, 1, dim, torch.bfloat16), causal=documents, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("capability", "dim"), [*((80, dim) for dim in (32, 64, 96, 128, 256)), *((90, dim) for dim in (64, 128, 256))]
)
def test_any_order_of_warps_gives_the_same_bits(emulator: emulated.Emulator, capability: int, dim: int) -> None:
    emulator.device(capability=capability)
    tensors = qkv(1, 150, 150, 2, 1, dim, torch.bfloat16)
    do, cu_seqlens = drawn(1, 150, 2, dim, dtype=torch.bfloat16), torch.tensor([0, 70, 150], dtype=torch.int32)
    expected = attend(emulator, *tensors, do, None, True, cu_seqlens, None, 0.2)
    for seed in range(1, 4):
        emulator.schedule(seed)
        assert same(attend(emulator, *tensors, do, None, True, cu_seqlens, None, 0.2), expected)


@pytest.mark.parametrize("capability", [80, 90])
def test_documents_that_start_nowhere_end(emulator: emulated.Emulator, capability: int) -> None:
    """Queries that see nothing, as `cu_seqlens` must not make them, get something, and nothing is read outside."""
    emulator.device(capability=capability)
    q, k, v = (emulator.guarded(t) for t in qkv(1, 300, 300, 1, 1, 64, torch.bfloat16))
    settings = (True, torch.tensor([280, 281], dtype=torch.int32), None, 0.2)
    o, _, dq, *_ = attend(emulator, q, k, v, q, None, *settings)
    assert same([o[:, 280], dq[:, 280]], [v[:, 280], torch.zeros_like(dq[:, 280])])


def test_errors_have_numbers(emulator: emulated.Emulator) -> None:
    ops = emulator.ops
    q = torch.zeros(2, 4, 4, 8, dtype=torch.bfloat16)
    lse, plain = torch.zeros(2, 4, 4), (True, None, None, 1.0)
    with pytest.raises(ValueError, match=r"q, k and v are Float.*take bf16 or fp16.*; choose `triton` or `sdpa`"):
        ops.attention(q.float(), q.float(), q.float(), *plain)
    with pytest.raises(ValueError, match=r"q, k and v are BFloat16 \[2, 4, 4, 8\], Half"):
        ops.attention(q, q.half(), q.half(), *plain)
    for dim in (4, 12, 264):
        odd = torch.zeros(1, 1, 1, dim, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f"head dim {dim}; the CUDA kernels take multiples of 8 up to 256"):
            ops.attention(odd, odd, odd, *plain)
    with pytest.raises(ValueError, match=r"scale is -1; the CUDA kernels need scale > 0"):
        ops.attention(q, q, q, True, None, None, -1.0)
    with pytest.raises(ValueError, match=r"lse is Float \[2, 4, 3\]; Float \[2, 4, 4\] is needed"):
        ops.attention_backward_(q, q, q, q, None, q, q, q, q, lse[..., :3], *plain)
    turned = torch.zeros(2, 4, 8, 4, dtype=torch.bfloat16).mT
    with pytest.raises(ValueError, match=r"dv is .* with a stride of 4 along its last dim"):
        ops.attention_backward_(q, q, turned, q, None, q, q, q, q, lse, *plain)
    with pytest.raises(ValueError, match=r"dk is BFloat16 \[2, 4, 4, 7\] but k is BFloat16 \[2, 4, 4, 8\]"):
        ops.attention_backward_(q, q[..., :7], q, q, None, q, q, q, q, lse, *plain)
    emulator.device(capability=75)
    with pytest.raises(ValueError, match=r"this device is sm_75; the CUDA kernels need sm_80"):
        ops.attention(q, q, q, *plain)
    emulator.device(capability=86)
    wide = torch.zeros(1, 1, 1, 104, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"head dim 104 needs more shared memory than a block of sm_86 has \(99 KiB"):
        ops.attention(wide, wide, wide, *plain)


def test_smaller_devices(emulator: emulated.Emulator) -> None:
    """Head dims up to 96 fit in the 99 KiB of shared memory of sm_86 and sm_89."""
    emulator.device(capability=86)
    for dim in (64, 96):
        obeys(guarded(emulator), *qkv(1, 40, 40, 1, 1, dim, torch.float16))
