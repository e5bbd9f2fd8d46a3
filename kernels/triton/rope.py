# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rotary embedding of queries and keys in one launch, in place or not; the backward is the rotation by the other angle.

    (a, b) -> (a cos - b sin, b cos + a sin); pairs (i, i + D/2), or (2i, 2i + 1) when interleaved

Bytes    2 passes over B*S*(N+K)*D elements; a token's cos and sin are read once by one program for all its heads.
Floor    bytes / copy rate: 8192 tokens, 32+8 heads of 128, bf16 on an H200: 39 us.
Measured 83% of copy (kernels_nvidia-h200_2026-11-20 in benchmarks/results).

One program a token (several when heads are few), one tile of queries and one of keys. q and k may be strided views of
one projection, as long as the dims of a head are adjacent. A position beyond the tables gives NaN and reads nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import as_heads, ceil_div, next_power_of_2


@triton.jit
def _rotate(
    x, out, heads, half, token, batch, place, there, cos, sin,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotates the tile [BLOCK_T, BLOCK_H, 2 * BLOCK_D] of tokens at `place` in `batch`, in place where `out` is None; x
    is `Heads`; cos, sin [BLOCK_T, 1, BLOCK_D]."""
    head = tl.arange(0, BLOCK_H)
    inside = there[:, None, None] & (head < heads)[None, :, None]
    source = batch * x.batch + place * x.token
    read = source[:, None, None] + head[None, :, None] * x.head
    x, write = x.start, read
    if out is None:
        out = x
    else:
        write = (token[:, None, None] * heads + head[None, :, None]) * (2 * half)
    if INTERLEAVED:
        dim = tl.arange(0, 2 * BLOCK_D)[None, None, :]
        inside = inside & (dim < 2 * half)
        value = tl.load(x + read + dim, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(value, [BLOCK_T, BLOCK_H, BLOCK_D, 2]))
        rotated = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BLOCK_T, BLOCK_H, 2 * BLOCK_D])
        tl.store(out + write + dim, rotated.to(out.dtype.element_ty), mask=inside)
    else:
        dim = tl.arange(0, BLOCK_D)[None, None, :]
        inside = inside & (dim < half)
        a = tl.load(x + read + dim, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + read + half + dim, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + write + dim, (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
        tl.store(out + write + half + dim, (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    q, k, q_out, k_out, cos, sin, positions, tokens, seq_length, table_rows, half, q_heads, k_heads,
    BACKWARD: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < tokens
    batch = (token // seq_length).to(tl.int64)
    place = (token % seq_length).to(tl.int64)
    position = place
    if positions is not None:
        position = tl.load(positions + token, mask=there, other=0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)[None, None, :]
    at = position[:, None, None] * half + dim
    known = (there & (position >= 0) & (position < table_rows))[:, None, None] & (dim < half)
    c = tl.load(cos + at, mask=known, other=float("nan"))
    s = tl.load(sin + at, mask=known, other=float("nan"))
    if BACKWARD:
        s = -s
    token = token.to(tl.int64)
    _rotate(q, q_out, q_heads, half, token, batch, place, there, c, s, INTERLEAVED, BLOCK_T, BLOCK_Q, BLOCK_D)
    _rotate(k, k_out, k_heads, half, token, batch, place, there, c, s, INTERLEAVED, BLOCK_T, BLOCK_K, BLOCK_D)


def policy(q_heads: int, k_heads: int, half: int) -> tuple[int, int, int, int, int]:
    """(tokens, query heads, key heads, pairs, warps) of a program: 2048 pairs of queries at least, 16 a thread."""
    block_q, block_k, block_d = next_power_of_2(q_heads), next_power_of_2(k_heads), next_power_of_2(half)
    tokens = max(1, 2048 // (max(block_q, block_k) * block_d))
    warps = min(max(tokens * max(block_q, block_k) * block_d // 512, 4), 16)
    return tokens, block_q, block_k, block_d, warps


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    backward: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotated (q, k): new and contiguous, or the inputs themselves when `in_place`; by the other angle when `backward`.

    q [B, S, N, D], k [B, S, K, D] of one dtype; cos, sin [P, D/2] fp32; positions [B, S] integers or None for 0 .. S-1.
    ValueError for work in place on heads whose dims are not adjacent, or that lie 2^31 elements or more apart: within a
    token places are 32-bit.
    """
    if not all(x.stride(3) == 1 and x.shape[2] * x.stride(2) < 2**31 for x in (q, k)):
        if in_place:
            raise ValueError(
                "rope: in place, a head's dims must be adjacent, and a token's heads within 2^31 elements; strides "
                f"{q.stride()}, {k.stride()}"
            )
        q, k = q.contiguous(), k.contiguous()
    batch, seq_length, q_heads, head_dim = q.shape
    k_heads = k.shape[2]
    q_out = q if in_place else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = k if in_place else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.numel() or k.numel():
        tile, block_q, block_k, block_d, warps = policy(q_heads, k_heads, head_dim // 2)
        rope_kernel[(ceil_div(batch * seq_length, tile),)](
            as_heads(q), as_heads(k), None if in_place else q_out, None if in_place else k_out,
            cos.contiguous(), sin.contiguous(), None if positions is None else positions.contiguous(),
            batch * seq_length, seq_length, cos.shape[0], head_dim // 2, q_heads, k_heads,
            BACKWARD=backward, INTERLEAVED=interleaved,
            BLOCK_T=tile, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return q_out, k_out


def rotate_in_place(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    """`rotate` over the memory of q and k."""
    return rotate(q, k, cos, sin, positions, interleaved, backward, in_place=True)
