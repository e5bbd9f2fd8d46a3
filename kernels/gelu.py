"""GELU with an optional bias in front of it.

    y = u * Phi(u), u = x + bias                                                      (Hendrycks & Gimpel 2016)
    approximate="tanh":  Phi(u) ~ (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))) / 2        (as in GPT-2)
    approximate="none":  Phi(u) = (1 + erf(u / sqrt(2))) / 2

Shapes   x, y [..., F]; bias [F].
Forward  about 15 FLOPs an element; reads x, writes y: 2 passes (4 while the bias is added by a call of its own).
Backward about 25 FLOPs an element; reads dy, u, writes dx: 3 passes; dbias is a sum over rows of dx.
Floor    memory: bytes / copy rate.

torch's gelu is one vectorised, registered aten op that keeps only its input: it is the fast form, and fake tensors,
autograd and torch.compile come with it.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import wide


def reference(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """Plain torch, the definition of correct. ValueError when `approximate` is neither "tanh" nor "none"."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f'gelu: approximate is {approximate!r}; it can be "tanh" or "none"')
    u = x.to(wide(x.dtype))
    if bias is not None:
        u = u + bias.to(u.dtype)
    if approximate == "tanh":
        phi = 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * u * u * u)))
    else:
        phi = 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5)))
    return (u * phi).to(x.dtype)


def fused_torch(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """Through torch's gelu kernel; the sum x + bias is rounded to the dtype of x before it. As `reference`."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f'gelu: approximate is {approximate!r}; it can be "tanh" or "none"')
    return F.gelu(x if bias is None else x + bias, approximate=approximate)
