"""Gated activations of a feed-forward layer whose gate and up projections are one matrix: SwiGLU and GeGLU.

    x = [g, u] along the last dim;   swiglu: y = silu(g) * u, silu(g) = g / (1 + exp(-g))
                                     geglu:  y = gelu(g) * u, gelu in the tanh form            (Shazeer 2020, eq. 6)

Shapes   x [..., 2F]; y [..., F].
Forward  about 6 FLOPs an output element (geglu 16); reads 2F, writes F.
Backward about 12 FLOPs (geglu 28); reads 2F and dy F, writes dx 2F. Only x is kept: silu(g) is computed again.
Floor    memory: bytes / copy rate.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .gelu import reference as gelu
from .precision import wide


def _halves(x_2F: Tensor) -> tuple[Tensor, Tensor]:
    if x_2F.shape[-1] % 2:
        raise ValueError(f"swiglu, geglu: the last dim is {x_2F.shape[-1]}; gate and up need an even one")
    gate, up = x_2F.chunk(2, dim=-1)
    return gate, up


def reference(x_2F: Tensor) -> Tensor:
    """SwiGLU in plain torch, the definition of correct: [..., 2F] -> [..., F] in the dtype of x."""
    gate, up = _halves(x_2F.to(wide(x_2F.dtype)))
    return (gate * torch.sigmoid(gate) * up).to(x_2F.dtype)


def geglu_reference(x_2F: Tensor) -> Tensor:
    """GeGLU in plain torch, the definition of correct: [..., 2F] -> [..., F] in the dtype of x."""
    gate, up = _halves(x_2F.to(wide(x_2F.dtype)))
    return (gelu(gate) * up).to(x_2F.dtype)


def composed_torch(x_2F: Tensor) -> Tensor:
    """SwiGLU through torch's silu; silu(g) is rounded to the dtype of x before the product. As `reference`."""
    gate, up = _halves(x_2F)
    return F.silu(gate) * up


def geglu_composed_torch(x_2F: Tensor) -> Tensor:
    """GeGLU through torch's gelu; gelu(g) is rounded to the dtype of x before the product. As `geglu_reference`."""
    gate, up = _halves(x_2F)
    return F.gelu(gate, approximate="tanh") * up
