"""Rotary position tables (Su et al. 2021, RoFormer, arXiv:2104.09864) and their long-context scalings.

    angle[p, i] = p * frequency[i],   frequency[i] = theta ** (-2 i / D),   i = 0 .. D/2 - 1

The pair (i, i + D/2) of every head is rotated by angle[p, i]. A scaling changes the frequencies, once, before any
training step; it costs nothing afterwards. Everything is computed in fp32 in the order of operations that Hugging Face
uses: at position 100,000 an fp32 angle is off by some 1e-2 rad whatever one does, so models that are to behave the same
in two programs must be wrong in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from megapre.config import Model, RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each rotated pair, fp32 [head_dim / 2]."""
    base = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return base
    if scaling.type == "linear":
        # Position interpolation (Chen et al. 2023, arXiv:2306.15595, eq. 4): stretch every wavelength alike.
        return base / scaling.factor
    assert scaling.type == "llama3", f"config.RopeScaling lets {scaling.type!r} through, which has no formula here"
    return _llama3(base, scaling)


def _llama3(base: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783, section 3.4; formula as in Meta's llama-models).

    Wavelengths that turned more than `high_freq_factor` times within the original context stay, those that turned less
    than `low_freq_factor` times are stretched by `factor`, and between the two the frequencies are blended linearly in
    the number of turns.
    """
    wavelength = 2 * math.pi / base
    turns = scaling.original_context / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * base / scaling.factor + blend * base
    slow = wavelength > scaling.original_context / scaling.low_freq_factor
    fast = wavelength < scaling.original_context / scaling.high_freq_factor
    return torch.where(fast, base, torch.where(slow, base / scaling.factor, blended))


class Rotary(nn.Module):
    """cos and sin for every position of the context, fp32 [context, D/2]: buffers that are no state.

    They are a function of the config alone, so no checkpoint holds them, and whatever moves, casts or materialises the
    model (`.to(bfloat16)`, `to_empty`), they are computed anew in fp32 on the device where the model then is.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: Model, device: torch.device | str) -> None:
        super().__init__()
        self.cfg = cfg
        self._fill(torch.device(device))

    def _fill(self, device: torch.device) -> None:
        if device.type == "meta":
            cos = sin = torch.empty(self.cfg.context, self.cfg.head_dim // 2, device=device)
        else:
            frequency = frequencies(self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)
            angle = torch.outer(torch.arange(self.cfg.context, dtype=torch.float32), frequency)
            cos, sin = angle.cos().to(device), angle.sin().to(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._fill(self.cos.device)
        return self
