"""The joined heads of one projection, qkv [B, S, N + 2K, D], and its queries, keys and values, views of it.

Autograd's own split joins the gradients of its parts by a copy. `split` needs none where a backward has written dq, dk
and dv side by side into one tensor, as attention's does for parts of one projection: that tensor is the gradient.
"""

from typing import Any

import torch
from torch import Tensor

QKV = tuple[Tensor, Tensor, Tensor]


def split(qkv_BSMD: Tensor, heads: int, kv_heads: int) -> QKV:
    """Views of the queries, keys and values. ValueError unless qkv is [B, S, N + 2K, D]."""
    if qkv_BSMD.dim() != 4 or qkv_BSMD.shape[2] != heads + 2 * kv_heads:
        raise ValueError(
            f"heads: qkv is {tuple(qkv_BSMD.shape)}; [B, S, {heads + 2 * kv_heads}, D] is needed for {heads} query "
            f"heads and {kv_heads} key-value heads"
        )
    if qkv_BSMD.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Split.apply(qkv_BSMD, heads, kv_heads)  # type: ignore[no-any-return]
    return _views(qkv_BSMD, heads, kv_heads)


def are_joined(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these lie in memory as the views that `split` returns. Never while torch traces."""
    if not (type(q) is type(k) is type(v) is Tensor) or q.dim() != 4 or not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        return False
    if not (q.stride() == k.stride() == v.stride() and q.dtype == k.dtype == v.dtype and q.shape[3] == k.shape[3]):
        return False
    head = q.stride(2) * q.element_size()
    return (
        q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        and k.data_ptr() == q.data_ptr() + q.shape[2] * head
        and v.data_ptr() == k.data_ptr() + k.shape[2] * head
    )


def _views(qkv: Tensor, heads: int, kv_heads: int) -> QKV:
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    return q, k, v


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, kv_heads: int) -> QKV:
        return _views(qkv, heads, kv_heads)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() or not are_joined(dq, dk, dv):
            return torch.cat((dq, dk, dv), dim=2), None, None
        batch, length, heads, dim = dq.shape
        shape = (batch, length, heads + dk.shape[2] + dv.shape[2], dim)
        return dq.as_strided(shape, dq.stride()), None, None
