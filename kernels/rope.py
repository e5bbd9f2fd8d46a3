"""Rotary position embedding of queries and keys.

    (a, b) -> (a cos - b sin, b cos + a sin)   for each pair of a head's dims, by the angle of its position
                                                                                  (Su et al. 2021, eq. 34)
Pairs: (i, i + D/2), the GPT-NeoX and Llama-in-Hugging-Face pairing; or (2i, 2i + 1) with interleaved=True, as in the
paper and Meta's Llama weights.

Shapes   q [B, S, N, D]; k [B, S, K, D]; cos, sin [P, D/2] fp32, row p belongs to position p; positions [B, S] int64.
Forward  6 FLOPs a pair; reads and writes q and k once: 2 passes over B*S*(N+K)*D elements; the tables are small.
Backward the same with -sin: a rotation's transpose is its inverse. Only cos and sin are kept for it.
Floor    memory: bytes / copy rate.
"""

import torch
from torch import Tensor

from .precision import wide


def reference(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain torch, the definition of correct. Rotates in fp32; returns (q, k) in their own dtypes.

    positions None means 0 .. S-1 in every row. ValueError when the head dim is odd or not twice the tables' width, or
    when the tables have fewer than S rows and positions is None; a position beyond the tables is torch's IndexError.
    """
    _check(q_BSND, k_BSKD, cos, sin, positions)
    if positions is None:
        seq_length = q_BSND.shape[1]
        cos_rows, sin_rows = cos[None, :seq_length, None], sin[None, :seq_length, None]
    else:
        cos_rows, sin_rows = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
    return _rotate(q_BSND, cos_rows, sin_rows, interleaved), _rotate(k_BSKD, cos_rows, sin_rows, interleaved)


def _rotate(x_BSND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    x = x_BSND.to(wide(x_BSND.dtype))
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return rotated.to(x_BSND.dtype)


def _check(q_BSND: Tensor, k_BSKD: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    head_dim, seq_length = q_BSND.shape[-1], q_BSND.shape[1]
    if k_BSKD.shape[-1] != head_dim or k_BSKD.shape[:2] != q_BSND.shape[:2]:
        raise ValueError(f"rope: q is {tuple(q_BSND.shape)} and k is {tuple(k_BSKD.shape)}; they differ only in heads")
    if cos.shape != sin.shape or 2 * cos.shape[-1] != head_dim:
        raise ValueError(
            f"rope: cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be [positions, head_dim / 2] "
            f"with head_dim {head_dim}"
        )
    if positions is None and seq_length > cos.shape[0]:
        raise ValueError(f"rope: {seq_length} positions are asked for, the tables hold {cos.shape[0]}")
