# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention backward: dK and dV by tiles of keys, dQ by tiles of queries; no atomics, the same bits on every run.

    delta_i = do_i . o_i - dlse_i;   p_ij = exp(s_ij - lse_i);   ds_ij = p_ij (do_i . v_j - delta_i)
    dv_j = sum_i p_ij do_i;   dk_j = scale sum_i ds_ij q_i;   dq_i = scale sum_j ds_ij k_j        (Dao 2023, algorithm
    2)

lse and its gradient come in base 2. Tiles, masks and heads: attention.py. A program of the first kernel owns a tile of
keys of one key head and walks the queries of all heads of its group, so the group's sum stays in registers.
Measured: see attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    LOG2E,
    Documents,
    keys_of,
    load_tile,
    queries_of,
    scaled,
    shape_of,
    tile_phases,
    tile_start,
    unit_stride,
)
from .launch import as_heads, ceil_div, next_power_of_2
from .tiles import Kind, Tiles, measured, within


@triton.jit
def delta_kernel(o, do, dlse, delta, shape, rows, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # over B, Sq, N as o lies in memory
    head = row % shape.q_heads
    query = row // shape.q_heads % shape.queries
    batch = row // shape.q_heads // shape.queries
    dim = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (dim < shape.head_dim)[None, :]
    at = batch * do.batch + query * do.token + head * do.head
    grad = tl.load(do.start + at[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    out = tl.load(o + row[:, None] * shape.head_dim + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    result = tl.sum(grad * out, 1)
    at = (batch * shape.q_heads + head) * shape.queries + query
    if dlse is not None:
        result -= tl.load(dlse + at, mask=row < rows, other=0.0) * LOG2E
    tl.store(delta + at, result, mask=row < rows)


@triton.jit
def _key_tiles(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, first, end, a, c, before, tiles, group, queries,
    q_stride, do_stride, q_stride_h, do_stride_h, head_dim, scale_log2,
    MASKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to dk, dv of one tile of keys what `tiles` tiles of queries of every head of the group contribute.

    One loop over heads and tiles: nested loops would drain the loads under way at every head, and cost registers.
    Scores are transposed: [keys, queries].
    """
    for index in tl.range(0, tiles * group):
        member = index // tiles
        query = tile_start(index - member * tiles, a, c, before, MASKED, BLOCK_M) + tl.arange(0, BLOCK_M)
        row = member * queries + query
        member = member.to(tl.int64)
        q = load_tile(q_base + member * q_stride_h, query, queries, q_stride, head_dim, MASKED, EVEN_D, BLOCK_D)
        if MASKED:
            lse = tl.load(lse_base + row, mask=query < queries, other=0.0)
            delta = tl.load(delta_base + row, mask=query < queries, other=0.0)
        else:
            lse = tl.load(lse_base + row)
            delta = tl.load(delta_base + row)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(scaled(s, scale_log2, k.dtype) - lse[None, :])
        if MASKED:
            p = tl.where((query[None, :] >= first[:, None]) & (query[None, :] < end[:, None]), p, 0.0)
        do = load_tile(do_base + member * do_stride_h, query, queries, do_stride, head_dim, MASKED, EVEN_D, BLOCK_D)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def key_kernel(
    q, k, v, do, lse, delta, dk, dv, shape, documents, window, scale, scale_log2,
    CAUSAL: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK_N  # the first keys are seen by most queries: they start first
    batch = (tl.program_id(1) // shape.k_heads).to(tl.int64)
    k_head = (tl.program_id(1) % shape.k_heads).to(tl.int64)
    # Divided here: with shape.group, the full mask of 128 dims spills 88 bytes a thread on sm_90 instead of 64 (the
    # causal one 72 instead of 80).
    group = shape.q_heads // shape.k_heads
    head = k_head * group
    key = start + tl.arange(0, BLOCK_N)
    first, end = queries_of(key, batch, shape, documents, window, CAUSAL)
    fi, ei = queries_of(start, batch, shape, documents, window, CAUSAL)
    fl, el = queries_of(start + BLOCK_N - 1, batch, shape, documents, window, CAUSAL)
    a, b, c, before, after = tile_phases(fi, ei, fl, el, BLOCK_M)
    k_base = k.start + batch * k.batch + k_head * k.head
    v_base = v.start + batch * v.batch + k_head * v.head
    k_tile = load_tile(k_base, key, shape.keys, k.token, shape.head_dim, True, EVEN_D, BLOCK_D)
    v_tile = load_tile(v_base, key, shape.keys, v.token, shape.head_dim, True, EVEN_D, BLOCK_D)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q_base = q.start + batch * q.batch + head * q.head
    do_base = do.start + batch * do.batch + head * do.head
    lse_base = lse + (batch * shape.q_heads + head) * shape.queries
    delta_base = delta + (batch * shape.q_heads + head) * shape.queries
    dk_tile, dv_tile = _key_tiles(
        dk_tile, dv_tile, k_tile, v_tile, q_base, do_base, lse_base, delta_base, first, end, b, b, 0,
        (c - b) // BLOCK_M, group, shape.queries, q.token, do.token, q.head, do.head, shape.head_dim, scale_log2,
        False, EVEN_D, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dk_tile, dv_tile = _key_tiles(
        dk_tile, dv_tile, k_tile, v_tile, q_base, do_base, lse_base, delta_base, first, end, a, c, before,
        before + after, group, shape.queries, q.token, do.token, q.head, do.head, shape.head_dim, scale_log2,
        True, EVEN_D, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    at = (((batch * shape.keys + key) * shape.k_heads + k_head) * shape.head_dim)[:, None] + dim[None, :]
    there = (key < shape.keys)[:, None] & (dim < shape.head_dim)[None, :]
    tl.store(dk + at, (dk_tile * scale).to(dk.dtype.element_ty), mask=there)
    tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), mask=there)


@triton.jit
def _query_tiles(
    dq, q, do, lse, delta, k_base, v_base, first, end, a, c, before, tiles, keys, k_stride, v_stride, head_dim,
    scale_log2, MASKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for index in tl.range(0, tiles):
        key = tile_start(index, a, c, before, MASKED, BLOCK_N) + tl.arange(0, BLOCK_N)
        k = load_tile(k_base, key, keys, k_stride, head_dim, MASKED, EVEN_D, BLOCK_D)
        v = load_tile(v_base, key, keys, v_stride, head_dim, MASKED, EVEN_D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(scaled(s, scale_log2, k.dtype) - lse[:, None])
        if MASKED:
            p = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def query_kernel(
    q, k, v, do, lse, delta, dq, shape, documents, window, scale, scale_log2,
    CAUSAL: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = (tl.program_id(1) // shape.q_heads).to(tl.int64)
    head = (tl.program_id(1) % shape.q_heads).to(tl.int64)
    k_head = head // shape.group
    query = start + tl.arange(0, BLOCK_M)
    first, end = keys_of(query, batch, shape, documents, window, CAUSAL)
    fi, ei = keys_of(start, batch, shape, documents, window, CAUSAL)
    fl, el = keys_of(start + BLOCK_M - 1, batch, shape, documents, window, CAUSAL)
    a, b, c, before, after = tile_phases(fi, ei, fl, el, BLOCK_N)
    q_base = q.start + batch * q.batch + head * q.head
    do_base = do.start + batch * do.batch + head * do.head
    k_base = k.start + batch * k.batch + k_head * k.head
    v_base = v.start + batch * v.batch + k_head * v.head
    q_tile = load_tile(q_base, query, shape.queries, q.token, shape.head_dim, True, EVEN_D, BLOCK_D)
    do_tile = load_tile(do_base, query, shape.queries, do.token, shape.head_dim, True, EVEN_D, BLOCK_D)
    row = (batch * shape.q_heads + head) * shape.queries + query
    lse_tile = tl.load(lse + row, mask=query < shape.queries, other=0.0)
    delta_tile = tl.load(delta + row, mask=query < shape.queries, other=0.0)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq_tile = _query_tiles(
        dq_tile, q_tile, do_tile, lse_tile, delta_tile, k_base, v_base, first, end, b, b, 0, (c - b) // BLOCK_N,
        shape.keys, k.token, v.token, shape.head_dim, scale_log2, False, EVEN_D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_tile = _query_tiles(
        dq_tile, q_tile, do_tile, lse_tile, delta_tile, k_base, v_base, first, end, a, c, before, before + after,
        shape.keys, k.token, v.token, shape.head_dim, scale_log2, True, EVEN_D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    at = ((batch * shape.queries + query) * shape.q_heads + head) * shape.head_dim
    there = (query < shape.queries)[:, None] & (dim < shape.head_dim)[None, :]
    tl.store(dq + at[:, None] + dim[None, :], (dq_tile * scale).to(dq.dtype.element_ty), mask=there)


def key_policy(head_dim: int, element_size: int, dense: bool) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of the kernel for dK and dV."""
    if element_size > 2:
        return 16, 32, 8, 1
    kind = Kind("keys", head_dim, element_size, dense)
    if found := measured(kind):
        return found
    return within(kind, Tiles(64, 128, 8, 2) if head_dim <= 128 else Tiles(32, 64, 8, 2))


def query_policy(head_dim: int, element_size: int, dense: bool) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of the kernel for dQ."""
    if element_size > 2:
        return 16, 32, 4, 1
    kind = Kind("queries", head_dim, element_size, dense)
    if found := measured(kind):
        return found
    if head_dim <= 64:
        return within(kind, Tiles(128, 64, 8, 3))
    return within(kind, Tiles(128, 64, 8, 2) if head_dim <= 128 else Tiles(64, 32, 8, 2))


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bounds: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in the dtypes of q, k, v. o, lse (in base 2) and bounds as the forward gave them; dlse
    is the gradient of that lse."""
    q, k, v, do = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(do)
    shape = shape_of(q, k)
    batch, queries, heads, head_dim = q.shape
    keys, k_heads = k.shape[1:3]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    block_d = max(next_power_of_2(head_dim), 16)
    delta = torch.empty_like(lse)
    rows = batch * queries * heads
    tile = max(2048 // block_d, 1)
    delta_kernel[(ceil_div(rows, tile),)](
        o, as_heads(do), None if dlse is None else dlse.contiguous(), delta, shape, rows,
        ROWS=tile, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    documents = Documents(bounds[0], bounds[1]) if bounds.numel() else None
    read = (as_heads(q), as_heads(k), as_heads(v), as_heads(do), lse, delta)
    told = (shape, documents, window, scale, scale * LOG2E.value)
    flags = {"CAUSAL": causal, "EVEN_D": block_d == head_dim, "BLOCK_D": block_d}
    dense = window is None and documents is None
    block_m, block_n, warps, stages = key_policy(head_dim, q.element_size(), dense)
    key_kernel[(ceil_div(keys, block_n), batch * k_heads)](
        *read, dk, dv, *told, **flags,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_m, block_n, warps, stages = query_policy(head_dim, q.element_size(), dense)
    query_kernel[(ceil_div(queries, block_m), batch * heads)](
        *read, dq, *told, **flags,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv
