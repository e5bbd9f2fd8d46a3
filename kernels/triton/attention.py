# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention forward and what both directions share: which keys a query sees, and which tiles need no mask.

    s_ij = scale q_i . k_j;   o_i = sum_j softmax_j(s_ij) v_j;   lse_i = log sum_j exp(s_ij)     (Dao 2023, algorithm 1)

Every mask here (causal, sliding window, documents, and any of them together) lets query i see one interval of keys, and
key j be seen by one interval of queries, and the ends of these intervals never move backwards. So for a tile of queries
    first(last query) .. end(first query)     are keys that all of them see: no mask in the loop;
    first(first query) .. end(last query)     are keys that any of them sees: tiles outside are never touched.
So the loop over key tiles is two: one without masks, one with them over the tiles on both sides of it.

FLOPs    forward 4 D, backward 14 D per (query, visible key, head): the backward is split into one kernel for dK and
         dV and one for dQ (7 products where a fused one has 5), which needs no atomics and is the same on every run.
Floor    FLOPs / product rate.
Measured on an H200, causal, heads 64/8 of 128, S 8192: 53% of the product rate forward and 42% backward; cuDNN
74% and 63% (kernels_nvidia-h200_2026-11-20 in benchmarks/results). A score takes 0.125 clocks of the tensor cores and
0.11 of the rest, 0.06 of them for its exponential, and the two warpgroups of one program do both in turn: 53%. The
scores are scaled once less since, which is 0.01 of that; not yet run on a GPU. Backward, 7 products are made for the 5
that are counted: 42% is 59% of the product rate.

Exponentials are taken in base 2, and lse goes to the backward in base 2: where a query sees one key, that is its score
to the bit; callers get it times ln 2 (ops.py). Heads are grouped: query head n reads key head n // (N / K) where it
lies, so a group's keys are shared through L2. Heavy tiles start first. Documents come as the first and the end key of
each token, worked out once on the device from cu_seqlens by bisection.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import as_heads, ceil_div, next_power_of_2
from .tiles import Kind, Tiles, measured, within

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


class Shape(NamedTuple):
    """q [B, queries, q_heads, head_dim], k and v [B, keys, k_heads, head_dim]; group: query heads of a key head."""

    queries: int
    keys: int
    q_heads: int
    k_heads: int
    group: int
    head_dim: int


class Documents(NamedTuple):
    """Of each token [B, S] int32: the first key of its document and the one after its last."""

    firsts: Tensor
    ends: Tensor


@triton.jit(do_not_specialize=["documents", "steps"])
def bounds_kernel(cu_seqlens, firsts, ends, tokens, seq_length, documents, steps, BLOCK: tl.constexpr):
    """Of each token: where its document begins and ends within its row; `steps` halvings of `documents`."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    low = tl.zeros([BLOCK], tl.int32)  # cu_seqlens[low] <= token < cu_seqlens[high]
    high = tl.zeros([BLOCK], tl.int32) + documents
    for _ in range(0, steps):
        middle = (low + high) // 2
        right = tl.load(cu_seqlens + middle, mask=inside, other=0) <= token
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    row = token // seq_length * seq_length
    first = tl.maximum(tl.load(cu_seqlens + low, mask=inside, other=0) - row, 0)
    end = tl.minimum(tl.load(cu_seqlens + low + 1, mask=inside, other=0) - row, seq_length)
    tl.store(firsts + token, first, mask=inside)
    tl.store(ends + token, end, mask=inside)


@triton.jit
def keys_of(query, batch, shape, documents, window, CAUSAL: tl.constexpr):
    """The interval of keys that `query` (one or many) sees. Queries past the last are taken as the last."""
    query = tl.minimum(query, shape.queries - 1)
    at = query + (shape.keys - shape.queries)
    first = query * 0
    end = first + shape.keys
    if CAUSAL:
        end = at + 1
    if window is not None:
        first = tl.maximum(at - window + 1, 0)
        if not CAUSAL:
            end = tl.minimum(at + window, end)
    if documents is not None:
        first = tl.maximum(first, tl.load(documents.firsts + batch * shape.keys + query))
        end = tl.minimum(end, tl.load(documents.ends + batch * shape.keys + query))
    return first, end


@triton.jit
def queries_of(key, batch, shape, documents, window, CAUSAL: tl.constexpr):
    """The interval of queries that see `key` (one or many). Keys past the last are taken as the last."""
    key = tl.minimum(key, shape.keys - 1)
    at = key - (shape.keys - shape.queries)
    first = key * 0
    end = first + shape.queries
    if CAUSAL:
        first = tl.maximum(at, 0)
    if window is not None:
        end = tl.minimum(at + window, end)
        if not CAUSAL:
            first = tl.maximum(at - window + 1, 0)
    if documents is not None:
        first = tl.maximum(first, tl.load(documents.firsts + batch * shape.keys + key))
        end = tl.minimum(end, tl.load(documents.ends + batch * shape.keys + key))
    return first, end


@triton.jit
def tile_phases(first_of_first, end_of_first, first_of_last, end_of_last, BLOCK: tl.constexpr):
    """(a, b, c, before, after): tiles of the other side begin at multiples of BLOCK. [b, c) need no mask; `before`
    tiles from a on and `after` tiles from c on need one."""
    a = first_of_first // BLOCK * BLOCK
    last = tl.cdiv(tl.maximum(end_of_last, a), BLOCK) * BLOCK
    b = tl.minimum(tl.cdiv(first_of_last, BLOCK) * BLOCK, last)
    c = tl.maximum(end_of_first // BLOCK * BLOCK, b)
    return a, b, c, (b - a) // BLOCK, (last - c) // BLOCK


@triton.jit
def load_tile(base, row, rows, stride, head_dim, MASKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D adjacent elements; rows >= `rows` are 0 where MASKED, dims >= head_dim are 0."""
    dim = tl.arange(0, BLOCK_D)
    at = base + row.to(tl.int64)[:, None] * stride + dim[None, :]
    if MASKED and EVEN_D:
        return tl.load(at, mask=(row < rows)[:, None], other=0.0)
    elif MASKED:
        return tl.load(at, mask=(row < rows)[:, None] & (dim < head_dim)[None, :], other=0.0)
    elif EVEN_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(dim < head_dim)[None, :], other=0.0)


@triton.jit
def tile_start(index, a, c, before, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Where tile `index` begins: of the masked ones (those from a, then those from c), or of the others (from a)."""
    start = a + index * BLOCK
    if MASKED:
        start = tl.where(index < before, start, c + (index - before) * BLOCK)
    return start


@triton.jit
def scaled(dots, scale_log2, dtype: tl.constexpr):
    """Scores in base 2. Of fp32 the product is rounded by itself: a compiler that fuses it with the subtraction that
    follows leaves, where a score meets itself, half an ulp of it and not 0."""
    if dtype == tl.float32:
        return tl.fma(dots, scale_log2, tl.zeros_like(dots))
    return dots * scale_log2


@triton.jit
def _forward_tiles(
    acc, total, top, q, k_base, v_base, first, end, a, c, before, tiles, keys, k_stride, v_stride, head_dim, scale_log2,
    MASKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for index in tl.range(0, tiles):
        start = tile_start(index, a, c, before, MASKED, BLOCK_N)
        key = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_base, key, keys, k_stride, head_dim, MASKED, EVEN_D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            s = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), s, NEG_INF)
        higher = tl.maximum(top, tl.max(s, 1) * scale_log2)  # the maximum of the scaled scores: rounding keeps order
        base = higher
        if MASKED:  # a query that has seen no key yet: exp2(-inf - 0) = 0, not exp2(-inf + inf)
            base = tl.where(higher == NEG_INF, 0.0, higher)
        p = tl.exp2(scaled(s, scale_log2, k.dtype) - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = load_tile(v_base, key, keys, v_stride, head_dim, MASKED, EVEN_D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = higher
    return acc, total, top


@triton.jit
def forward_kernel(
    q, k, v, o, lse, shape, documents, window, scale_log2,
    CAUSAL: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q, k and v are `Heads`; o is contiguous. The same of the two kernels of the backward."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last queries see most keys: they start first
    batch = (tl.program_id(1) // shape.q_heads).to(tl.int64)
    head = (tl.program_id(1) % shape.q_heads).to(tl.int64)
    k_base = k.start + batch * k.batch + head // shape.group * k.head
    v_base = v.start + batch * v.batch + head // shape.group * v.head
    query = start + tl.arange(0, BLOCK_M)
    first, end = keys_of(query, batch, shape, documents, window, CAUSAL)
    fi, ei = keys_of(start, batch, shape, documents, window, CAUSAL)
    fl, el = keys_of(start + BLOCK_M - 1, batch, shape, documents, window, CAUSAL)
    a, b, c, before, after = tile_phases(fi, ei, fl, el, BLOCK_N)
    q_base = q.start + batch * q.batch + head * q.head
    q_tile = load_tile(q_base, query, shape.queries, q.token, shape.head_dim, True, EVEN_D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    acc, total, top = _forward_tiles(
        acc, total, top, q_tile, k_base, v_base, first, end, b, b, 0, (c - b) // BLOCK_N, shape.keys, k.token, v.token,
        shape.head_dim, scale_log2, False, EVEN_D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, total, top = _forward_tiles(
        acc, total, top, q_tile, k_base, v_base, first, end, a, c, before, before + after, shape.keys, k.token,
        v.token, shape.head_dim, scale_log2, True, EVEN_D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    dim = tl.arange(0, BLOCK_D)
    at = ((batch * shape.queries + query) * shape.q_heads + head) * shape.head_dim
    there = (query < shape.queries)[:, None] & (dim < shape.head_dim)[None, :]
    tl.store(o + at[:, None] + dim[None, :], acc.to(o.dtype.element_ty), mask=there)
    at = (batch * shape.q_heads + head) * shape.queries + query
    tl.store(lse + at, top + tl.log2(total), mask=query < shape.queries)


def policy(head_dim: int, element_size: int, dense: bool) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a forward tile. Smaller tiles of keys where many are skipped or cut."""
    if element_size > 2:
        return 32, 32, 8, 1
    kind = Kind("forward", head_dim, element_size, dense)
    if found := measured(kind):
        return found
    if head_dim <= 64:
        return within(kind, Tiles(128, 64, 4, 3))
    if head_dim <= 128:
        return within(kind, Tiles(128, 128, 8, 2) if dense else Tiles(128, 64, 8, 3))
    return within(kind, Tiles(64, 64, 8, 2))  # of 128 queries, sm_80 has not the shared memory, nor the registers


def unit_stride(x: Tensor) -> Tensor:
    """x with its head dim adjacent: itself where it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def shape_of(q: Tensor, k: Tensor) -> Shape:
    """What the kernels are told of the sizes of q [B, Sq, N, D] and k [B, Sk, K, D]."""
    (queries, q_heads, head_dim), (keys, k_heads) = q.shape[1:], k.shape[1:3]
    return Shape(queries, keys, q_heads, k_heads, q_heads // k_heads, head_dim)


def document_bounds(cu_seqlens: Tensor, batch: int, seq_length: int) -> Tensor:
    """[2, B, S] int32: of each token the first key of its document and the one after its last, within its row.

    `cu_seqlens` rises from 0 to B*S, as the caller promises: nothing is copied to the host to look.
    """
    cu_seqlens = cu_seqlens.contiguous()
    bounds = torch.empty(2, batch, seq_length, dtype=torch.int32, device=cu_seqlens.device)
    tokens = batch * seq_length
    documents = cu_seqlens.numel() - 1
    if tokens:
        bounds_kernel[(ceil_div(tokens, 256),)](
            cu_seqlens,
            bounds[0],
            bounds[1],
            tokens,
            seq_length,
            documents,
            documents.bit_length(),
            BLOCK=256,
            num_warps=4,
        )
    return bounds


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bounds: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [B, Sq, N, D] contiguous in the dtype of q, lse / ln 2 [B, N, Sq] fp32).

    ValueError unless scale > 0 and D <= 256.
    """
    if scale <= 0.0 or q.shape[3] > 256:
        raise ValueError(
            f"attention: head dim {q.shape[3]} and scale {scale}; this kernel needs D <= 256 and scale > 0"
        )
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, queries, heads, head_dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if q.numel():
        block_m, block_n, warps, stages = policy(head_dim, q.element_size(), bounds is None and window is None)
        block_d = max(next_power_of_2(head_dim), 16)
        forward_kernel[(ceil_div(queries, block_m), batch * heads)](
            as_heads(q), as_heads(k), as_heads(v), o, lse, shape_of(q, k),
            None if bounds is None else Documents(bounds[0], bounds[1]), window, scale * LOG2E.value,
            CAUSAL=causal, EVEN_D=block_d == head_dim,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return o, lse


def forward_with_documents(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, lse, bounds): `forward` with the documents of `cu_seqlens`; bounds is empty without them."""
    bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, q.shape[0], q.shape[1])
    o, lse = forward(q, k, v, causal, bounds, window, scale)
    return o, lse, q.new_empty(0, dtype=torch.int32) if bounds is None else bounds
