"""Clipping by the global norm, decided on the device.

The factor min(1, clip / (norm + 1e-6)) (Pascanu et al. 2013; the epsilon is torch.nn.utils.clip_grad_norm_'s) is a
device scalar that the optimizer multiplies into each gradient as it reads it: gradients are not written a second time,
and the host never waits to learn the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip_factor(norm: Tensor, clip: float) -> Tensor | None:
    """Multiplier for the gradients whose global norm is `norm` (0-dim fp32), or None when `clip` is 0: no clipping."""
    return torch.clamp(clip / (norm + 1e-6), max=1.0) if clip > 0 else None


def not_finite(*scalars: Tensor) -> Tensor:
    """1.0 where any of the 0-dim tensors is NaN or infinite, else 0.0: the optimizer's `found_inf`."""
    return 1.0 - torch.isfinite(torch.stack(scalars)).all().to(torch.float32)
