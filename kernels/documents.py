"""Documents in packed rows: `cu_seqlens` [documents + 1] counts tokens over the flattened B*S, from 0 to B*S."""

from itertools import pairwise

import torch
from torch import Tensor


def check(op: str, cu_seqlens: Tensor | None, tokens: int) -> None:
    """ValueError when it does not rise from 0 to `tokens`. Only looked at on the CPU: it costs a sync elsewhere."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to B*S = {tokens}; it is {ends[:3]} .. {ends[-3:]}")


def numbers(cu_seqlens: Tensor, batch: int, seq_length: int) -> Tensor:
    """[B, S] int64: which document each token belongs to, from 0; documents of no tokens are counted."""
    token = torch.arange(batch * seq_length, device=cu_seqlens.device)
    return (torch.searchsorted(cu_seqlens.long(), token, right=True) - 1).view(batch, seq_length)


def positions(cu_seqlens: Tensor, batch: int, seq_length: int) -> Tensor:
    """[B, S] int64: the place of each token in its document, or in the part of it that its row of the batch holds."""
    token = torch.arange(batch * seq_length, device=cu_seqlens.device).view(batch, seq_length)
    start = cu_seqlens.long()[numbers(cu_seqlens, batch, seq_length)]
    return token - torch.maximum(start, token[:, :1])
