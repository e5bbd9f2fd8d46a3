"""What tests of rope hold it against: Hugging Face's rotation in any dtype, over tables and positions as they draw."""

import torch
from torch import Tensor

ROWS = 30
"""Positions of the tables, if no other number is given."""
PLACES = ("none", "given", "documents")


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(half: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [rows, half], for a head dim of 2 half."""
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def places(kind: str, batch: int, length: int, seed: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """positions and cu_seqlens as the op takes them, and the positions that they mean, found token by token."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "given":
        positions = torch.randint(0, ROWS, (batch, length), generator=generator)
        return positions, None, positions
    if kind == "none":
        return None, None, torch.arange(length).expand(batch, length)
    tokens = batch * length
    inner = torch.randint(0, tokens + 1, (4,), generator=generator).tolist()  # empty documents too
    bounds = sorted([0, *inner, tokens])
    meant: list[int] = []
    for token in range(tokens):
        begins = token % length == 0 or token in bounds
        meant.append(0 if begins else meant[-1] + 1)
    return None, torch.tensor(bounds, dtype=torch.int32), torch.tensor(meant).view(batch, length)


def own(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate-half in the dtype of x, as Hugging Face's Llama; interleaved pairs are moved apart and back."""
    if interleaved:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    cos2, sin2 = (torch.cat((t, t), -1).to(x.dtype)[positions].unsqueeze(2) for t in (cos, sin))
    half = x.shape[-1] // 2
    y = x * cos2 + torch.cat((-x[..., half:], x[..., :half]), -1) * sin2
    return torch.stack(y.chunk(2, -1), -1).flatten(-2) if interleaved else y
