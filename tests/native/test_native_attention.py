"""The C++ attention, beyond tests/forms: gradients in new memory, repeatability, the share of the cache, errors."""

from typing import Any

import pytest
import torch
from attended import drawn, qkv
from rule import same
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def native(ops: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor | None, *settings: Any) -> list[Tensor]:
    o, lse = ops.attention(q, k, v, *settings)
    return [o, lse, *ops.attention_backward(do, dlse, q, k, v, o, lse, *settings)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_new_memory_are_those_in_given_memory(ops: Any, dtype: torch.dtype) -> None:
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(2, 70, 70, 4, 2, 24, dtype)]
    do, dlse, settings = torch.ones_like(tensors[0]), torch.ones(2, 4, 70), (True, None, 30, 0.2)
    o, lse, *gradients = native(ops, *tensors, do, dlse, *settings)
    given = [torch.full_like(t, torch.nan) for t in gradients]
    ops.attention_backward_(*given, do, dlse, *tensors, o, lse, *settings)
    assert same(gradients, given) and all(t.is_contiguous() for t in (o, lse, *gradients))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "key_heads"), [(2, 4, 2), (1, 1, 1), (1, 5, 1)])
def test_repeats_bit_by_bit(ops: Any, dtype: torch.dtype, batch: int, heads: int, key_heads: int) -> None:
    """On every number of threads; what is not summed over queries (o, lse, dq) is the same on all of them."""
    q, k, v = qkv(batch, 300, 300, heads, key_heads, 32, dtype)
    do = drawn(*q.shape, dtype=dtype)
    runs = []
    for threads in (1, 2, 3, 1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(native(ops, q, k, v, do, None, True, None, None, 0.2))
    torch.set_num_threads(1)
    for first, again in zip(runs[:3], runs[3:], strict=True):
        assert same(first, again)
    for other in runs[1:3]:
        assert same(runs[0][:3], other[:3])
        for a, b in zip(runs[0][3:], other[3:], strict=True):
            torch.testing.assert_close(a, b)


def test_many_tiles_fill_and_empty_the_cache_share(ops: Any) -> None:
    """More tiles of queries than are worked on at once, by several heads and threads, against one head at a time."""
    q, k, v = qkv(1, 400, 450, 6, 2, 256, torch.float32)
    do = drawn(*q.shape, dtype=torch.float32)
    torch.set_num_threads(3)
    o, _, dq, dk, dv = native(ops, q, k, v, do, None, True, None, None, 0.1)
    torch.set_num_threads(1)
    sums = [torch.zeros_like(k), torch.zeros_like(v)]
    for head in range(6):
        at, key_head = slice(head, head + 1), slice(head // 3, head // 3 + 1)
        alone = native(
            ops, q[:, :, at], k[:, :, key_head], v[:, :, key_head], do[:, :, at], None, True, None, None, 0.1
        )
        assert same([o[:, :, at], dq[:, :, at]], [alone[0], alone[2]])
        for total, part in zip(sums, alone[3:], strict=True):
            total[:, :, key_head] += part
    for got, total in zip((dk, dv), sums, strict=True):
        torch.testing.assert_close(got, total, atol=1e-4, rtol=1e-5)


def test_sums_of_parts_stay_few(ops: Any) -> None:
    """Sums over queries of dk and dv: one key head and many threads must not hold one for every cut of the work."""
    length, dim, threads = 4096, 256, 16
    one = 2 * length * dim * 4
    q, k, v = qkv(1, length, length, 1, 1, dim, torch.bfloat16)
    settings = (True, None, 64, 0.1)
    torch.set_num_threads(threads)
    o, lse = ops.attention(q, k, v, *settings)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.attention_backward(q, None, q, k, v, o, lse, *settings)
    torch.set_num_threads(1)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert threads * one <= largest < 2 * threads * one


def test_errors_have_numbers(ops: Any) -> None:
    q = torch.zeros(2, 4, 4, 8)
    lse, plain = torch.zeros(2, 4, 4), (True, None, None, 1.0)
    with pytest.raises(ValueError, match=r"q, k and v are Double.*takes one of fp32, bf16 and fp16.*reference"):
        ops.attention(q.double(), q.double(), q.double(), *plain)
    with pytest.raises(ValueError, match="q, k and v are Float, BFloat16 and Float"):
        ops.attention(q, q.bfloat16(), q, *plain)
    with pytest.raises(ValueError, match=r"head dim 257; native attention takes 1 to 256, sdpa and reference take any"):
        ops.attention(*[torch.zeros(1, 1, 1, 257)] * 3, *plain)
    for cuts in ([0, 4], [1, 8], [0, 5, 4, 8], [0], []):
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to B\*S = 8"):
            ops.attention(q, q, q, True, torch.tensor(cuts, dtype=torch.int32), None, 1.0)
    with pytest.raises(ValueError, match=r"do is .*\[2, 4, 4, 7\] but q is .*\[2, 4, 4, 8\]"):
        ops.attention_backward(q[..., :7], None, q, q, q, q, lse, *plain)
    with pytest.raises(ValueError, match=r"lse is Float \[2, 4, 3\]; fp32 \[2, 4, 4\] is needed"):
        ops.attention_backward(q, None, q, q, q, q, lse[..., :3], *plain)
    for dk, words in (
        (q[..., :7], r"dk is Float \[2, 4, 4, 7\] but k is Float \[2, 4, 4, 8\]"),
        (torch.zeros(2, 4, 8, 4).mT, r"dk has shape .* and strides \[128, 32, 1, 4\]; to be written, the 8 elements"),
        (torch.zeros(2, 4, 1, 8).expand_as(q), r"strides \[32, 8, 0, 1\].*rows must not overlap"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.attention_backward_(q.clone(), dk, q.clone(), q, None, q, q, q, q, lse, *plain)
    with pytest.raises(ValueError, match=r"dlse is .*Double"):
        ops.attention_backward(q, lse.double(), q, q, q, q, lse, *plain)
