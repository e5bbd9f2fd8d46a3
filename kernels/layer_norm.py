"""Layer normalisation over the last dim, with the residual addition in front of it.

    h = x + residual          (h = x without a residual; h is rounded to the dtype of x)
    y = (h - mean(h)) * rstd * weight + bias,   rstd = 1 / sqrt(var(h) + eps), var biased        (Ba et al. 2016, eq. 4)

Shapes   x, residual, y, h [..., H]; weight, bias [H].
Forward  8 H FLOPs a row; reads x (and residual), writes y (and h): 2 (4) passes over T*H elements.
Backward about 14 H FLOPs a row; reads dy, h (and dh), writes dx: 3 (4) passes, and two fp32 sums over rows.
Floor    memory: bytes / copy rate. On a CPU core at about 80 FLOP per byte the arithmetic is free.

torch's own kernel (one pass forward, rows split over threads) is the fast form on the CPU. It is a registered aten op:
fake tensors, autograd and torch.compile come with it, so no op of this package wraps it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import wide


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch, the definition of correct. Returns y, or (y, h) when a residual is given, in the dtype of x."""
    h = x if residual is None else x + residual
    h_wide = h.to(wide(x.dtype))
    centred = h_wide - h_wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y_wide = centred * rstd * weight.to(h_wide.dtype)
    if bias is not None:
        y_wide = y_wide + bias.to(h_wide.dtype)
    y = y_wide.to(x.dtype)
    return y if residual is None else (y, h)


def fused_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Through torch's layer_norm kernel, which saves h, mean and rstd and nothing else. As `reference`."""
    h = x if residual is None else x + residual
    with torch.autocast(x.device.type, enabled=False):  # on CUDA, autocast would make y fp32
        y = F.layer_norm(h, weight.shape, weight, bias, eps)
    return y if residual is None else (y, h)
