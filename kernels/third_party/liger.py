"""Liger's Triton kernels (Hsu et al. 2024, arXiv:2410.10989) as rows of norms, gated activations and rope.

Called through its autograd functions in `liger_kernel.ops`, in the forms that leave their inputs alone: norms compute
in fp32 and round once ("gemma" casting) and do not write over dy; swiglu reads gate and up where they lie.
Its geglu writes the gradients over the gate and up that it kept, and its rope turns in place: both get copies here.

Left out: cross-entropy waits for the device (it counts the valid labels on the host), rounds losses to the dtype of the
logits and writes their gradient over them; linear + cross-entropy does the first too. Both are peers in the benchmarks.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import documents
from ..layer_norm import fused_torch as layer_norm_of_torch
from ..rms_norm import fused_torch as rms_norm_of_torch
from ..rope import check
from . import found

LEAST = "0.8.5"
TAKES_ROPE = "pairs of halves (interleaved = False)"


def why_not(device: str) -> str:
    return found.why_not(device, "Liger", ("liger_kernel", "triton"), "liger-kernel", LEAST)


def _ops(module: str) -> Any:
    return importlib.import_module(f"liger_kernel.ops.{module}")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `rms_norm.reference`, for fp32, bf16 and fp16."""
    if x.numel() == 0:
        return rms_norm_of_torch(x, weight, eps, residual)  # no kernel is launched on no rows
    if residual is None:
        return _ops("rms_norm").LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)  # type: ignore[no-any-return]
    function = _ops("fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return function.apply(x, residual, weight, eps, 0.0, "gemma", False)  # type: ignore[no-any-return]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `layer_norm.reference`, for fp32, bf16 and fp16; the residual is added by torch."""
    if x.numel() == 0:
        return layer_norm_of_torch(x, weight, bias, eps, residual)
    h = x if residual is None else x + residual
    bias = torch.zeros_like(weight) if bias is None else bias
    y = _ops("layer_norm").LigerLayerNormFunction.apply(h, weight, bias, eps)
    return y if residual is None else (y, h)


def swiglu(x_2F: Tensor) -> Tensor:
    """As `swiglu.reference`; silu(g) is rounded to the dtype of x before the product."""
    _check_even(x_2F)
    if x_2F.numel() == 0:
        return x_2F[..., : x_2F.shape[-1] // 2]
    rows = x_2F.reshape(-1, x_2F.shape[-1])  # of more dims it would return a gradient of two
    y = _ops("swiglu").LigerFusedGateUpSiLUMulFunction.apply(rows, False)
    return y.view(*x_2F.shape[:-1], -1)  # type: ignore[no-any-return]


def geglu(x_2F: Tensor) -> Tensor:
    """As `swiglu.geglu_reference`; gelu(g) is rounded to the dtype of x before the product."""
    _check_even(x_2F)
    if x_2F.numel() == 0:
        return x_2F[..., : x_2F.shape[-1] // 2]
    return _Geglu.apply(x_2F)  # type: ignore[no-any-return]


def _check_even(x: Tensor) -> None:
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu, geglu: the last dim is {x.shape[-1]}; gate and up need an even one")


class _Geglu(torch.autograd.Function):
    """Keeps x alone; the kernels get copies of its halves, which the backward writes the gradients into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = (half.clone(memory_format=torch.contiguous_format) for half in x.chunk(2, dim=-1))
        return _ops("geglu").geglu_forward(gate, up)[2]  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        gate, up = (half.clone(memory_format=torch.contiguous_format) for half in ctx.saved_tensors[0].chunk(2, dim=-1))
        return torch.cat(_ops("geglu").geglu_backward(gate, up, dy.contiguous()), dim=-1)


def rope(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rope.reference`. ValueError for interleaved pairs."""
    check(q_BSND, k_BSKD, cos, sin, positions, cu_seqlens)
    if interleaved:
        raise ValueError(f"rope: liger takes {TAKES_ROPE}; choose `triton` or `reference`")
    batch, length = q_BSND.shape[:2]
    if cu_seqlens is not None:
        positions = documents.positions(cu_seqlens, batch, length)
    # [1 or B, S, D]: a row of its tables has each angle twice.
    rows = (table[None, :length] if positions is None else table[positions] for table in (cos, sin))
    wide_cos, wide_sin = (torch.cat((row, row), dim=-1) for row in rows)
    if q_BSND.numel() == 0:
        return q_BSND.clone(), k_BSKD.clone()
    return _Rope.apply(q_BSND, k_BSKD, wide_cos, wide_sin)  # type: ignore[no-any-return]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q_BNSD, k_BKSD, *_ = _ops("rope").rope_forward(_turned(q), _turned(k), cos, sin)
        return q_BNSD.transpose(1, 2), k_BKSD.transpose(1, 2)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dq_BNSD, dk_BKSD = _ops("rope").rope_backward(_turned(dq), _turned(dk), *ctx.saved_tensors)
        return dq_BNSD.transpose(1, 2), dk_BKSD.transpose(1, 2), None, None


def _turned(x_BSND: Tensor) -> Tensor:
    """A copy that Liger may turn in place, as the [B, N, S, D] view that it takes."""
    return x_BSND.clone(memory_format=torch.contiguous_format).transpose(1, 2)
