"""The Triton kernels as functions with the registry's signatures.

All take fp32, bf16 and fp16 tensors and compute in fp32. They call the torch ops of library.py, which torch.compile
leaves as they are. Importing this file imports no Triton.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import documents
from ..adamw import Update
from ..adamw import _check as check_adamw
from ..adamw import _check_stochastic as check_adamw_stochastic
from ..attention import check as check_attention
from ..attention import sdpa
from ..cross_entropy import check as check_cross_entropy
from ..gradient_sink import sink_of
from ..heads import split as split_heads
from ..linear_cross_entropy import check_shapes as check_linear_cross_entropy
from ..rope import InPlace, Turn, in_place
from ..rope import check as check_rope
from ..vocab_parallel_linear_cross_entropy import Gather, Halves
from ..vocab_parallel_linear_cross_entropy import chunked as in_chunks
from . import loss_into_sink
from .library import late
from .library import register as register
from .library import why_not as why_not

SILU, GELU_TANH, GELU_ERF = 0, 1, 2  # as in activation.py
LN2 = math.log(2.0)  # the op's lse is in base 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: the Triton kernel takes fp32, bf16 and fp16, not {x.dtype}; choose `reference`")


def _check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """A kernel reads by pointer: what is too short would be read past its end."""
    _check_dtype(op, x)
    if weight.shape != x.shape[-1:] or (bias is not None and bias.shape != weight.shape):
        shapes = tuple(weight.shape), None if bias is None else tuple(bias.shape)
        raise ValueError(f"{op}: weight and bias are {shapes}; x {tuple(x.shape)} needs [{x.shape[-1]}]")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"{op}: residual is {tuple(residual.shape)} {residual.dtype} and x {tuple(x.shape)} {x.dtype}; "
            "both must agree"
        )


def _check_one_dtype(op: str, *tensors: Tensor) -> None:
    _check_dtype(op, tensors[0])
    if len({t.dtype for t in tensors}) > 1:
        raise ValueError(f"{op}: the inputs must share a dtype; they are {[t.dtype for t in tensors]}")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.rms_norm.reference`."""
    _check_norm("rms_norm", x, weight, None, residual)
    y, h, _, _ = torch.ops.megapre_triton.norm(x, weight, None, eps, residual, False)
    return y if residual is None else (y, h)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.layer_norm.reference`."""
    _check_norm("layer_norm", x, weight, bias, residual)
    y, h, _, _ = torch.ops.megapre_triton.norm(x, weight, bias, eps, residual, True)
    return y if residual is None else (y, h)


def rope(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.rope.reference`, but a position beyond the tables gives NaN."""
    turn = _turn("rope", q_BSND, k_BSKD, cos, sin, positions, cu_seqlens, interleaved)
    return torch.ops.megapre_triton.rope(  # type: ignore[no-any-return]
        q_BSND, k_BSKD, turn.cos, turn.sin, turn.positions, interleaved, False
    )


def rope_(
    qkv_BSMD: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.rope.reference_`, in place, but a position beyond the tables gives NaN."""
    q, k, v = split_heads(qkv_BSMD, heads, kv_heads)
    turn = _turn("rope_", q, k, cos, sin, positions, cu_seqlens, interleaved)
    if torch.compiler.is_compiling():
        q, k = torch.ops.megapre_triton.rope(q, k, turn.cos, turn.sin, turn.positions, interleaved, False)
        return q, k, v
    return in_place(_ROPE_HALVES, qkv_BSMD, heads, kv_heads, turn)


def _turn(
    op: str,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
) -> Turn:
    check_rope(q, k, cos, sin, positions, cu_seqlens)
    _check_one_dtype(op, q, k)
    if cu_seqlens is not None:
        positions = documents.positions(cu_seqlens, *q.shape[:2])
    positions = None if positions is None else positions.expand(q.shape[:2])
    return Turn(cos.float(), sin.float(), positions, None, interleaved)


def _rope_forward(qkv: Tensor, heads: int, kv_heads: int, turn: Turn) -> None:
    q, k, _ = split_heads(qkv, heads, kv_heads)
    late("rope", "rotate_in_place")(q, k, turn.cos, turn.sin, turn.positions, turn.interleaved, False)
    torch.autograd.graph.increment_version(qkv)  # torch sees no write of a Triton kernel


def _rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, turn: Turn) -> Tensor:
    dqkv = torch.cat((dq, dk, dv), dim=2)
    dq, dk, _ = split_heads(dqkv, dq.shape[2], dk.shape[2])
    late("rope", "rotate_in_place")(dq, dk, turn.cos, turn.sin, turn.positions, turn.interleaved, True)
    return dqkv


_ROPE_HALVES = InPlace(_rope_forward, _rope_backward)


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """As `kernels.gelu.reference`."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f'gelu: approximate is {approximate!r}; it can be "tanh" or "none"')
    _check_dtype("gelu", x)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"gelu: bias is {tuple(bias.shape)}; x {tuple(x.shape)} needs [{x.shape[-1]}]")
    kind = GELU_TANH if approximate == "tanh" else GELU_ERF
    return torch.ops.megapre_triton.gelu(x, bias, kind)  # type: ignore[no-any-return]


def swiglu(x_2F: Tensor) -> Tensor:
    """As `kernels.swiglu.reference`."""
    return _gated(x_2F, SILU)


def geglu(x_2F: Tensor) -> Tensor:
    """As `kernels.swiglu.geglu_reference`."""
    return _gated(x_2F, GELU_TANH)


def _gated(x: Tensor, kind: int) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu, geglu: the last dim is {x.shape[-1]}; gate and up need an even one")
    _check_dtype("swiglu, geglu", x)
    return torch.ops.megapre_triton.gated(x, kind)  # type: ignore[no-any-return]


def cross_entropy(
    logits_TV: Tensor,
    labels_T: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab: int | None = None,
) -> Tensor:
    """As `kernels.cross_entropy.reference`, but a label outside [0, vocab) gives NaN."""
    vocab = check_cross_entropy(logits_TV.shape, labels_T, vocab)
    _check_dtype("cross_entropy", logits_TV)
    settings = (ignore_index, label_smoothing, z_loss, vocab)
    return torch.ops.megapre_triton.cross_entropy(logits_TV, labels_T, *settings)[0]  # type: ignore[no-any-return]


def linear_cross_entropy(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab: int | None = None,
    upstream: Tensor | None = None,
) -> Tensor:
    """As `kernels.linear_cross_entropy.reference`; weight is taken and logits are rounded in the dtype of x.

    Where the weight has a sink (gradient_sink.py) dW goes straight into it: in the backward where all logits are kept,
    else during the forward, if `upstream` is given.
    """
    vocab = check_linear_cross_entropy(x_TH, weight_VH, labels_T, vocab)
    _check_dtype("linear_cross_entropy", x_TH)
    weight = weight_VH.to(x_TH.dtype)
    settings = (ignore_index, label_smoothing, z_loss, vocab)
    grad = torch.is_grad_enabled()
    need_dx, need_dweight = grad and x_TH.requires_grad, grad and weight.requires_grad
    # In fp16 gradients would underflow when the upstream one (one over the tokens) comes in before they are rounded.
    early = x_TH.dtype != torch.float16
    into_sink = early and weight is weight_VH and sink_of(weight) is not None
    if into_sink and one_chunk(x_TH, weight):
        return loss_into_sink.KeptLogits.apply(x_TH, weight, labels_T, settings)  # type: ignore[no-any-return]
    if into_sink and upstream is not None:
        return loss_into_sink.Chunks.apply(x_TH, weight, labels_T, upstream, settings)  # type: ignore[no-any-return]
    if (need_dx or need_dweight) and early and one_chunk(x_TH, weight):
        loss, _, _ = torch.ops.megapre_triton.linear_cross_entropy_kept(x_TH, weight, labels_T, *settings)
        return loss  # type: ignore[no-any-return]
    loss, _, _ = torch.ops.megapre_triton.linear_cross_entropy(x_TH, weight, labels_T, *settings, need_dx, need_dweight)
    return loss  # type: ignore[no-any-return]


def vocab_parallel_linear_cross_entropy(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    gather: Gather,
    vocab_start: int,
    vocab: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    upstream: Tensor | None = None,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.vocab_parallel_linear_cross_entropy.chunked`, but a label outside [0, vocab) gives NaN on CUDA."""
    _check_dtype("vocab_parallel_linear_cross_entropy", x_TH)
    shard = (gather, vocab_start, vocab, ignore_index, label_smoothing, z_loss)
    return in_chunks(x_TH, weight_VH, labels_T, *shard, upstream, return_losses, Halves(_local, _merge, _gradient_))


def _local(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    return torch.ops.megapre_triton.cross_entropy_local(  # type: ignore[no-any-return]
        logits, labels, vocab_start, vocab, ignore_index, label_smoothing != 0
    )


def _merge(stats: Tensor, labels: Tensor, *terms: float) -> tuple[Tensor, Tensor]:
    return torch.ops.megapre_triton.cross_entropy_merge(stats, labels, *terms)  # type: ignore[no-any-return]


def _gradient_(logits: Tensor, labels: Tensor, lse: Tensor, dlosses: Tensor | None, *terms: float) -> None:
    torch.ops.megapre_triton.cross_entropy_local_backward_(logits, labels, lse, dlosses, *terms)


def one_chunk(x: Tensor, weight: Tensor) -> bool:
    """Whether all logits fit one chunk (linear_cross_entropy.py), so that they can be kept for the backward."""
    return x.shape[0] <= most_rows(weight.shape[0], x.element_size())


def most_rows(vocab: int, element_size: int) -> int:
    """Rows whose logits fit a chunk of about 1 GiB; at least 1024."""
    return max((1 << 30) // (max(vocab, 1) * element_size), 1024)


def attention(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.attention.reference`, for head dims up to 256 and scale > 0. lse can be differentiated."""
    check_attention(q_BSND, k_BSKD, v_BSKD, cu_seqlens, window)
    _check_one_dtype("attention", q_BSND, k_BSKD, v_BSKD)
    if q_BSND.shape[0] * q_BSND.shape[2] > 65535:  # a grid's second dim on every CUDA device
        raise ValueError(
            f"attention: the Triton kernel takes at most 65535 batch x heads, "
            f"not {q_BSND.shape[0]} x {q_BSND.shape[2]}; choose `sdpa`"
        )
    scale = 1.0 / math.sqrt(q_BSND.shape[-1]) if scale is None else scale
    o, lse, _ = torch.ops.megapre_triton.attention(q_BSND, k_BSKD, v_BSKD, causal, cu_seqlens, window, scale)
    return (o, lse * LN2) if return_lse else o


def attention_by_mask(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` for documents, windows and lse, which SDPA serves with whole masks or not at all; else SDPA."""
    sparse = cu_seqlens is not None or window is not None or return_lse
    form = attention if sparse and q_BSND.shape[-1] <= 256 else sdpa
    return form(q_BSND, k_BSKD, v_BSKD, causal, cu_seqlens, window, scale, return_lse)


@torch.no_grad()
def adamw_(
    param: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    **update: Any,
) -> None:
    """As `kernels.adamw.reference`, for fp32 states."""
    check_adamw(param, master, exp_avg, exp_avg_sq, grad)
    separate = None if param is master else param  # a schema must not name one tensor twice among what it writes
    torch.ops.megapre_triton.adamw_(separate, master, exp_avg, exp_avg_sq, grad, *Update(**update).arguments())


@torch.no_grad()
def adamw_stochastic_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    seed: int,
    offset: int = 0,
    **update: Any,
) -> None:
    """As `kernels.adamw.stochastic_reference`, with the same random bits."""
    check_adamw_stochastic(param, exp_avg, exp_avg_sq, grad, offset)
    told = Update(**update).arguments()
    torch.ops.megapre_triton.adamw_stochastic_(param, exp_avg, exp_avg_sq, grad, *told, seed, offset)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """As `kernels.grad_norm.reference`."""
    for grad in grads:
        _check_dtype("grad_norm", grad)
    return torch.ops.megapre_triton.grad_norm(list(grads))  # type: ignore[no-any-return]
