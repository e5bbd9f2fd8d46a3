"""What tests of attention's kernels hold them against: torch's own attention, and its gradients, in any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def qkv(batch: int, queries: int, keys: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(batch, queries, heads, dim), (batch, keys, key_heads, dim), (batch, keys, key_heads, dim)]
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, do: Tensor, dlse: Tensor) -> list[Tensor]:
    """o, lse, dq, dk, dv by torch: o and its gradient from SDPA, those of lse from scores in wide precision."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    group = q.shape[2] // k.shape[2]
    q_, k_, v_ = (t.repeat_interleave(r, 2).transpose(1, 2) for t, r in zip(leaves, (1, group, group), strict=True))
    o = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=scale).transpose(1, 2)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q_.to(wide) @ k_.to(wide).transpose(-1, -2) * scale
    lse = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).logsumexp(-1)
    grads = torch.autograd.grad([o, lse], leaves, [do.to(o.dtype), dlse.to(wide)])
    return [o.detach(), lse.detach(), *grads]
