"""Transformer Engine's norms and gated activations, through its public operations (transformer_engine.pytorch.ops).

Its norms are modules that hold their weight, so a call makes one around the caller's. That and its operation fuser cost
the host tens of microseconds a call: these rows are for those who compare, or who want its numbers.

Left out: rope takes angles, where ours takes their cosines and sines; parallel_cross_entropy writes the gradient over
its logits and has no z-loss.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from ..layer_norm import fused_torch as layer_norm_of_torch
from ..rms_norm import fused_torch as rms_norm_of_torch
from . import found

LEAST = "2.0"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: str) -> str:
    modules = ("transformer_engine", "transformer_engine_torch")
    return found.why_not(device, "Transformer Engine", modules, "transformer_engine", LEAST) or found.needs_capability(
        (8, 0), "Transformer Engine"
    )


def _ops() -> Any:
    return importlib.import_module("transformer_engine.pytorch.ops")


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `layer_norm.reference`; the residual is added by torch. ValueError for fp64, or when dtypes differ."""
    _check("layer_norm", x, weight)
    if x.numel() == 0:
        return layer_norm_of_torch(x, weight, bias, eps, residual)
    h = x if residual is None else x + residual
    bias = torch.zeros_like(weight) if bias is None else bias
    norm = _around(_ops().LayerNorm(weight.shape[0], eps=eps, device="meta", dtype=weight.dtype), weight, bias)
    y = norm(h)
    return y if residual is None else (y, h)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `rms_norm.reference`; the residual is added by torch. ValueError for fp64, or when dtypes differ."""
    _check("rms_norm", x, weight)
    if x.numel() == 0:
        return rms_norm_of_torch(x, weight, eps, residual)
    h = x if residual is None else x + residual
    norm = _around(_ops().RMSNorm(weight.shape[0], eps=eps, device="meta", dtype=weight.dtype), weight)
    y = norm(h)
    return y if residual is None else (y, h)


def _around(norm: torch.nn.Module, weight: Tensor, bias: Tensor | None = None) -> torch.nn.Module:
    """`norm` with the caller's tensors for its parameters, whether they are nn.Parameters or not."""
    held: dict[str, Any] = norm._parameters
    held["weight"] = weight
    if bias is not None:
        held["bias"] = bias
    return norm


def swiglu(x_2F: Tensor) -> Tensor:
    """As `swiglu.reference`. ValueError for fp64."""
    _check_gated("swiglu", x_2F)
    return _ops().SwiGLU()(x_2F) if x_2F.numel() else x_2F[..., : x_2F.shape[-1] // 2]  # type: ignore[no-any-return]


def geglu(x_2F: Tensor) -> Tensor:
    """As `swiglu.geglu_reference`. ValueError for fp64."""
    _check_gated("geglu", x_2F)
    return _ops().GEGLU()(x_2F) if x_2F.numel() else x_2F[..., : x_2F.shape[-1] // 2]  # type: ignore[no-any-return]


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        raise ValueError(
            f"{op}: transformer_engine takes fp32, bf16 and fp16, x and weight alike; they are {x.dtype} and "
            f"{weight.dtype}; choose `triton` or `reference`"
        )


def _check_gated(op: str, x: Tensor) -> None:
    if x.shape[-1] % 2 or x.dtype not in DTYPES:
        raise ValueError(
            f"{op}: transformer_engine takes an even last dim in fp32, bf16 or fp16; x is {tuple(x.shape)} {x.dtype}"
        )
