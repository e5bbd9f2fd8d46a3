"""FlashAttention-3 and -2 (Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608) as rows of `attention`.

Both are called through their public functions: `flash_attn_interface` is FlashAttention-3, for sm_90 and later, and
`flash_attn` is FlashAttention-2, for sm_80 and later. Causal masks of both are aligned at the last key, as ours are,
and their windows (left, right) count keys beside the query's own.

Documents go to the functions for packed sequences. These know no rows of a batch, so the ends of the rows are merged
into cu_seqlens, by a sort on the device: ends that were there already make documents of length 0. The longest document
is not known to the host, so the length of a row stands for it.

Their backward adds up dq in the order in which blocks end; under torch.use_deterministic_algorithms in a fixed one.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from ..attention import check
from . import found

TAKES = "fp16 and bf16, head dims to 256, no lse"
LEAST_2, LEAST_3 = "2.7", "3.0"


def why_not_3(device: str) -> str:
    return found.why_not(device, "FlashAttention-3", ("flash_attn_interface",)) or found.needs_capability(
        (9, 0), "FlashAttention-3"
    )


def why_not_2(device: str) -> str:
    return found.why_not(
        device, "FlashAttention-2", ("flash_attn", "flash_attn_2_cuda"), "flash_attn", LEAST_2
    ) or found.needs_capability((8, 0), "FlashAttention-2")


def flash_attention_3(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor:
    """As `attention.reference`. ValueError for what TAKES leaves out."""
    module = importlib.import_module("flash_attn_interface")
    return _attend("flash_attention_3", module, q_BSND, k_BSKD, v_BSKD, causal, cu_seqlens, window, scale, return_lse)


def flash_attention_2(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor:
    """As `attention.reference`. ValueError for what TAKES leaves out."""
    module = importlib.import_module("flash_attn")
    return _attend("flash_attention_2", module, q_BSND, k_BSKD, v_BSKD, causal, cu_seqlens, window, scale, return_lse)


def _attend(
    name: str,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float | None,
    return_lse: bool,
) -> Tensor:
    check(q, k, v, cu_seqlens, window)
    if return_lse or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        asked = f"{q.dtype} with head dim {q.shape[-1]}{' and lse' if return_lse else ''}"
        raise ValueError(f"attention: {name} takes {TAKES}; this call has {asked}; choose `sdpa_or_triton` or `triton`")
    if q.numel() == 0:
        return torch.zeros_like(q)
    settings = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (-1, -1) if window is None else (window - 1, 0 if causal else window - 1),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if cu_seqlens is None:
        return module.flash_attn_func(q, k, v, **settings)  # type: ignore[no-any-return]
    batch, length = q.shape[:2]
    ends = with_rows(cu_seqlens, batch, length)
    packed = (t.flatten(0, 1) for t in (q, k, v))
    o = module.flash_attn_varlen_func(*packed, ends, ends, length, length, **settings)
    return o.view(q.shape)  # type: ignore[no-any-return]


def with_rows(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """cu_seqlens and the ends of the rows in order, int32 [documents + 1 + batch]."""
    rows = torch.arange(length, (batch + 1) * length, length, dtype=torch.int32, device=cu_seqlens.device)
    return torch.cat((cu_seqlens.to(torch.int32), rows)).sort().values
