"""What tests of attention's kernels hold them against: torch's own attention, and its gradients, in any dtype."""

from collections.abc import Callable
from typing import Any

import torch
from rule import close
from torch import Tensor
from torch.nn import functional as F

from megapre.kernels import attention

OUTPUTS = ("o", "lse", "dq", "dk", "dv")
Attend = Callable[..., list[Tensor]]
"""OUTPUTS from q, k, v, do, dlse or None, causal, cu_seqlens, window and scale."""


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


def attend(
    form: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor | None, *settings: object
) -> list[Tensor]:
    """OUTPUTS of a native form (native_forms.py), the gradients written over NaN with no memory behind their ends."""
    o, lse = form.ops.attention(q, k, v, *settings)
    gradients = [torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (q, k, v)]
    gradients = [form.guarded(t) if t.numel() else t for t in gradients]
    form.ops.attention_backward_(*gradients, do, dlse, q, k, v, o, lse, *settings)
    return [o, lse, *gradients]


def guarded(form: Any) -> Attend:
    """`attend` with every input at the end of its memory."""
    return lambda *tensors: attend(form, *(form.guarded(t) for t in tensors[:5]), *tensors[5:])


def documents_of(cuts: list[int] | None, batch: int, keys: int) -> Tensor | None:
    """cu_seqlens that end documents at `cuts`: empty where two cuts meet, one of a token; int32, or int64 for rows."""
    if cuts is None:
        return None
    ends = sorted(min(cut, batch * keys) for cut in cuts)
    bounds = [0, *ends, *(end + 1 for end in ends[-1:] if end < batch * keys), batch * keys]
    return torch.tensor(bounds, dtype=torch.int32 if batch == 1 else torch.int64)


def obeys(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    slack: float = 0.0,
) -> None:
    """Asserts the rule for the outputs and, plus `slack`, for the gradients of o and lse."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    do = drawn(*q.shape, dtype=q.dtype, seed=9).to(q.device)
    dlse = drawn(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, seed=9).to(q.device)
    mask = attention.visible(q, k, causal, cu_seqlens, window)
    got = attend(q, k, v, do, dlse, causal, cu_seqlens, window, scale)
    assert [t.dtype for t in got] == [q.dtype, torch.float32, q.dtype, q.dtype, q.dtype]
    torchs = own(q, k, v, mask, scale, do, dlse)
    exact = own(*(t.double() for t in (q, k, v)), mask, scale, do.double(), dlse)
    for what, g, t, e in zip(OUTPUTS, got, torchs, exact, strict=True):
        assert g.shape == e.shape
        close(g, t, e, what, slack if what[0] == "d" else 0.0)
