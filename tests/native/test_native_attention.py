"""The C++ attention, op by op: the 2x rule against fp64, masks, layouts, poison, repeatability, errors."""

from typing import Any

import pytest
import torch
from attended import drawn, own, qkv
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor

from megapre.kernels import attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around tiles of 64 queries and keys.
LENGTHS = st.integers(1, 70) | st.sampled_from([64, 127, 128, 129, 191, 200, 257])
DIMS = st.sampled_from([1, 7, 8, 16, 31, 32, 40, 64, 96, 128, 129, 256])


def native(ops: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor | None, *settings: Any) -> list[Tensor]:
    o, lse = ops.attention(q, k, v, *settings)
    return [o, lse, *ops.attention_backward(do, dlse, q, k, v, o, lse, *settings)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    batch=st.integers(1, 2),
    keys=LENGTHS,
    cached=st.none() | st.integers(0, 100),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dim=DIMS,
    causal=st.booleans(),
    window=st.none() | st.integers(1, 150),
    documents=st.none() | st.lists(st.integers(0, 514), max_size=6),
    scale=st.sampled_from([None, 0.3, 0.0, -0.1]),
)
def test_obeys_the_rule(
    ops: Any,
    dtype: torch.dtype,
    batch: int,
    keys: int,
    cached: int | None,
    key_heads: int,
    group: int,
    dim: int,
    causal: bool,
    window: int | None,
    documents: list[int] | None,
    scale: float | None,
) -> None:
    """Documents are empty where two cuts meet, and of one token where they are neighbours."""
    queries = keys if documents is not None or cached is None else max(1, keys - cached)
    cu_seqlens = None
    if documents is not None:
        cuts = sorted(min(d, batch * keys) for d in documents)
        cu_seqlens = torch.tensor([0, *cuts, *(c + 1 for c in cuts[-1:] if c < batch * keys), batch * keys]).int()
    q, k, v = qkv(batch, queries, keys, key_heads * group, key_heads, dim, dtype)
    do = drawn(*q.shape, dtype=dtype, seed=9)
    dlse = drawn(batch, key_heads * group, queries, dtype=torch.float32, seed=9)
    scale = dim**-0.5 if scale is None else scale
    mask = attention.visible(q, k, causal, cu_seqlens, window)
    got = native(ops, q, k, v, do, dlse, causal, cu_seqlens, window, scale)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype, dtype]
    torchs = own(q, k, v, mask, scale, do, dlse)
    exact = own(*(t.double() for t in (q, k, v)), mask, scale, do.double(), dlse)
    # do . v and do . o are sums of up to 256 products of order one, in two orders. In fp32 the noise of their
    # difference, some ulps of 16, reaches the gradients even where these are 0; torch may be lucky.
    slack = 16 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.0
    for what, g, t, e in zip(("o", "lse", "dq", "dk", "dv"), got, torchs, exact, strict=True):
        assert g.shape == e.shape
        close(g, t, e, what, slack if what[0] == "d" else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_do_not_matter(ops: Any, dtype: torch.dtype) -> None:
    """Views of one projection, transposed and reversed strides, an expanded tensor: the same bits as whole tensors."""
    batch, length, heads, key_heads, dim = 2, 130, 4, 2, 24
    do = drawn(batch, length, heads, dim, dtype=dtype)
    packed = drawn(batch, length, heads + 2 * key_heads, dim, dtype=dtype)
    head_major = drawn(batch, heads + 2 * key_heads, length, dim, dtype=dtype).transpose(1, 2)
    dim_major = drawn(dim, heads + 2 * key_heads, length, batch, dtype=dtype).permute(3, 2, 1, 0)
    one_row = drawn(1, length, heads + 2 * key_heads, dim, dtype=dtype).expand(batch, -1, -1, -1)
    settings = (True, torch.tensor([0, 100, 101, 150, 2 * length], dtype=torch.int32), 90, 0.2)
    for tensor in (packed, head_major, dim_major, one_row):
        parts = tensor.split([heads, key_heads, key_heads], dim=2)
        for upstream in (do, do.transpose(1, 2).contiguous().transpose(1, 2), do[:, :, :, :1].expand_as(do)):
            strided = native(ops, *parts, upstream, None, *settings)
            whole = native(ops, *(t.contiguous() for t in parts), upstream.contiguous(), None, *settings)
            assert same(strided, whole)
            assert all(t.is_contiguous() for t in strided)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_projection_are_written_side_by_side(ops: Any, dtype: torch.dtype) -> None:
    """Into views of one tensor, and nowhere else: the same bits as gradients by themselves."""
    heads, key_heads = 4, 2
    qkv = drawn(2, 70, heads + 2 * key_heads, 24, dtype=dtype)
    parts = qkv.split([heads, key_heads, key_heads], dim=2)
    do, settings = drawn(2, 70, heads, 24, dtype=dtype), (True, None, None, 0.2)
    whole = native(ops, *parts, do, None, *settings)
    room = torch.full((2, 70, heads + 2 * key_heads + 1, 27), 7.0, dtype=dtype)
    gradients = room[:, :, :-1, 2:26].split([heads, key_heads, key_heads], dim=2)
    ops.attention_backward_(*gradients, do, None, *parts, *whole[:2], *settings)
    assert same([*gradients], whole[2:])
    assert (room[:, :, -1] == 7).all() and (room[..., :2] == 7).all() and (room[..., 26:] == 7).all()


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_poison(ops: Any, dtype: torch.dtype) -> None:
    """Scores of thousands neither overflow nor vanish; a NaN reaches the queries that see it, or at most their tile."""
    q, k, v = qkv(1, 200, 200, 1, 1, 32, dtype)
    mask = attention.visible(q, k, True, None, None)
    do, dlse = torch.ones_like(q), torch.zeros(1, 1, 200)
    got = native(ops, q * 30, k * 30, v, do, None, True, None, None, 0.5)
    exact = own((q * 30).double(), (k * 30).double(), v.double(), mask, 0.5, do.double(), dlse)
    torchs = own(q * 30, k * 30, v, mask, 0.5, do, dlse)
    for what, g, t, e in zip(("o", "lse", "dq", "dk", "dv"), got, torchs, exact, strict=True):
        close(g, t, e, what)
    for bad in (torch.nan, torch.inf):
        k[0, 150, 0, 3] = bad
        o, lse, dq, *_ = native(ops, q.abs() + 0.1, k, v, do, None, True, None, None, 0.5)
        assert o[:, 150:].isnan().all() and lse[:, :, 150:].isnan().all() and dq[:, 150:].isnan().all()
        assert o[:, :128].isfinite().all() and lse[:, :, :150].isfinite().all() and dq[:, :128].isfinite().all()


def test_whole_tiles_of_other_documents_are_never_read(ops: Any) -> None:
    """Keys that no query sees may be NaN, if they share no tile with keys that some query sees."""
    q, k, v = qkv(1, 256, 256, 2, 2, 16, torch.float32)
    k2, v2 = k.clone(), v.clone()
    k2[:, :128], v2[:, :128] = torch.nan, torch.nan
    settings = (True, torch.tensor([0, 128, 256], dtype=torch.int32), None, 0.25)
    do = torch.ones_like(q)
    before, after = (native(ops, q, *kv, do, None, *settings) for kv in ((k, v), (k2, v2)))
    assert same([t[:, 128:] for t in (before[0], *before[2:])], [t[:, 128:] for t in (after[0], *after[2:])])
    before, after = (native(ops, q[:, 192:], *kv, do[:, 192:], None, True, None, 64, 0.25) for kv in ((k, v), (k2, v2)))
    assert same([before[0], before[2]], [after[0], after[2]])
    assert not after[3][:, :128].any() and not after[4][:, :128].any()


def test_empty(ops: Any) -> None:
    for shape, keys in (((0, 4, 2, 8), 4), ((2, 0, 2, 8), 0), ((2, 0, 2, 8), 3), ((1, 4, 0, 8), 4)):
        q, k = torch.zeros(shape), torch.zeros(shape[0], keys, 2, 8)
        o, lse, dq, dk, dv = native(ops, q, k, k, q, None, True, None, None, 1.0)
        assert (o.shape, dq.shape, dk.shape, dv.shape) == (shape, shape, k.shape, k.shape)
        assert lse.shape == (shape[0], shape[2], shape[1])
        assert same([dk, dv], [k, k])


def test_errors_have_numbers(ops: Any) -> None:
    q = torch.zeros(2, 4, 4, 8)
    lse, plain = torch.zeros(2, 4, 4), (True, None, None, 1.0)
    with pytest.raises(ValueError, match=r"q, k and v are Double.*takes one of fp32, bf16 and fp16.*reference"):
        ops.attention(q.double(), q.double(), q.double(), *plain)
    with pytest.raises(ValueError, match="q, k and v are Float, BFloat16 and Float"):
        ops.attention(q, q.bfloat16(), q, *plain)
    with pytest.raises(ValueError, match=r"head dim 257; native attention takes 1 to 256, sdpa and reference take any"):
        ops.attention(*[torch.zeros(1, 1, 1, 257)] * 3, *plain)
    with pytest.raises(ValueError, match=r"need q \[B, Sq, N, D\]"):
        ops.attention(q[0], q, q, *plain)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3 key heads"):
        ops.attention(q, q[:, :, :3], q[:, :, :3], *plain)
    with pytest.raises(ValueError, match="batch and head dim must agree"):
        ops.attention(q, q[:1], q[:1], *plain)
    with pytest.raises(ValueError, match="4 queries but only 3 keys"):
        ops.attention(q, q[:, :3], q[:, :3], *plain)
    with pytest.raises(ValueError, match="window is 0"):
        ops.attention(q, q, q, True, None, 0, 1.0)
    for cuts in ([0, 4], [1, 8], [0, 5, 4, 8], [0], []):
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to B\*S = 8"):
            ops.attention(q, q, q, True, torch.tensor(cuts, dtype=torch.int32), None, 1.0)
    with pytest.raises(ValueError, match=r"cu_seqlens is Float"):
        ops.attention(q, q, q, True, torch.tensor([0.0, 8.0]), None, 1.0)
    with pytest.raises(ValueError, match=r"need Sq = Sk; they are 3 and 4"):
        ops.attention(q[:, :3], q, q, True, torch.tensor([0, 8], dtype=torch.int32), None, 1.0)
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
