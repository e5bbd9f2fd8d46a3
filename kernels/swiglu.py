"""Gated activations of a feed-forward layer whose gate and up projections are one matrix: SwiGLU and GeGLU.

    x = [g, u] along the last dim;   swiglu: y = silu(g) * u, silu(g) = g / (1 + exp(-g))
                                     geglu:  y = gelu(g) * u, gelu in the tanh form            (Shazeer 2020, eq. 6)

Shapes   x [..., 2F]; y [..., F].
Forward  about 6 FLOPs an output element (geglu 16); reads 2F, writes F.
Backward dg = dy * u * silu'(g), du = dy * silu(g): about 12 FLOPs (geglu 28); reads 2F and dy F, writes dx 2F. Only x
         is kept: silu(g) is computed again, where a composition keeps it, half as much as x itself.
Floor    memory: bytes / copy rate.
Measured bf16 2048 x 2816, native: forward 1.7 ms (geglu 1.7), backward 2.0 (2.1); torch 3.4 (7.0) and 6.1 (9.5). The
         same bytes moved without arithmetic take 1.2 and 1.8 ms: what is between is the exponential and the division.
         AMD EPYC (Zen 4, AVX-512 bf16), two threads, memory kept, torch 2.13, minimum of 14, 2026-11-21.
         CUDA C++: not yet run on a GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library
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


def native(x_2F: Tensor) -> Tensor:
    """SwiGLU through the C++ form of `megapre::swiglu`: one pass each way. As `reference`."""
    return torch.ops.megapre.swiglu(x_2F)  # type: ignore[no-any-return]


def geglu_native(x_2F: Tensor) -> Tensor:
    """GeGLU through the C++ form of `megapre::geglu`: one pass each way. As `geglu_reference`."""
    return torch.ops.megapre.geglu(x_2F)  # type: ignore[no-any-return]


# The registered ops: kernels in plain torch, fake tensors, autograd.


def _forward(x: Tensor) -> Tensor:
    gate, up = _halves(x)
    return F.silu(gate).mul_(up).contiguous()


def _geglu_forward(x: Tensor) -> Tensor:
    gate, up = _halves(x)
    return F.gelu(gate, approximate="tanh").mul_(up).contiguous()


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    (gate, up), dx = _halves(x), x.new_empty(x.shape)
    dgate, dup = _halves(dx)
    activated = F.silu(gate)
    torch.mul(activated, dy, out=dup)
    torch.ops.aten.silu_backward(torch.mul(dy, up, out=activated), gate, grad_input=dgate)
    return dx


def _geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    (gate, up), dx = _halves(x), x.new_empty(x.shape)
    dgate, dup = _halves(dx)
    activated = F.gelu(gate, approximate="tanh")
    torch.mul(activated, dy, out=dup)
    torch.ops.aten.gelu_backward(torch.mul(dy, up, out=activated), gate, approximate="tanh", grad_input=dgate)
    return dx


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::swiglu`, `megapre::geglu` and their backwards."""
    for name, forward, backward in (("swiglu", _forward, _backward), ("geglu", _geglu_forward, _geglu_backward)):
        library.add(ops, f"{name}(Tensor x) -> Tensor", forward, lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
        library.add(
            ops, f"{name}_backward(Tensor dy, Tensor x) -> Tensor", backward, lambda dy, x: x.new_empty(x.shape)
        )
        differentiate = getattr(torch.ops.megapre, f"{name}_backward")
        torch.library.register_autograd(
            f"megapre::{name}",
            lambda ctx, dy, differentiate=differentiate: differentiate(dy, *ctx.saved_tensors),
            setup_context=_save,
            lib=ops,
        )
