"""The Triton kernels as torch ops (`torch.ops.megapre_triton.*`) and as functions with the registry's signatures.

Each op has a fake tensor function and, where it can be differentiated, a backward that is an op too, so torch.compile
calls the kernels as they are and compiles what lies between them. All take fp32, bf16 and fp16 tensors and compute in
fp32.
"""

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adamw import _check as check_adamw
from ..attention import _check as check_attention
from ..attention import sdpa
from ..cross_entropy import check as check_cross_entropy
from ..linear_cross_entropy import _check as check_linear_cross_entropy
from ..rope import _check as check_rope

NAMESPACE = "megapre_triton"
SILU, GELU_TANH, GELU_ERF = 0, 1, 2  # as in activation.py
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: str) -> str:
    """Why the kernels cannot run on "cpu" or "cuda" here; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a CPU only in its interpreter (TRITON_INTERPRET=1), for tests"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need compute capability 8.0"
    return ""


@functools.cache
def register() -> torch.library.Library:
    """Registers the ops. Idempotent; the result keeps them alive. Imports no Triton."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for schema, module, function, fake in _OPS:
        name = schema.split("(", 1)[0]
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, _late(module, function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    for name, (save, differentiate) in _GRADIENTS.items():
        torch.library.register_autograd(f"{NAMESPACE}::{name}", differentiate, setup_context=save, lib=library)
    return library


def _late(module: str, function: str) -> Callable[..., Any]:
    """The function of a kernel's module, which is imported, and Triton with it, by the first call."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f".{module}", __package__), function)(*arguments)

    return call


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: the Triton kernel takes fp32, bf16 and fp16, not {x.dtype}; choose `reference`")


# rms_norm, layer_norm


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.rms_norm.reference`."""
    _check_dtype("rms_norm", x)
    y, h, _, _ = torch.ops.megapre_triton.norm(x, weight, None, eps, residual, False)
    return y if residual is None else (y, h)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.layer_norm.reference`."""
    _check_dtype("layer_norm", x)
    y, h, _, _ = torch.ops.megapre_triton.norm(x, weight, bias, eps, residual, True)
    return y if residual is None else (y, h)


def _fake_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = _rows(x) if centred else x.new_empty(0, dtype=torch.float32)
    return _like(x), x.new_empty(0) if residual is None else _like(x), mean, _rows(x)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, residual, ctx.centred = inputs
    _, h, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x if residual is None else h, weight, mean, rstd)


def _differentiate_norm(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    dh = dh if ctx.has_residual else None
    dx, dweight, dbias = torch.ops.megapre_triton.norm_backward(
        dy, dh, h, weight, mean, rstd, ctx.centred, ctx.has_bias
    )
    return dx, dweight, dbias if ctx.has_bias else None, None, dx if ctx.has_residual else None, None


# rope


def rope(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `kernels.rope.reference`, but a position beyond the tables gives NaN."""
    check_rope(q_BSND, k_BSKD, cos, sin, positions)
    _check_dtype("rope", q_BSND)
    return torch.ops.megapre_triton.rope(  # type: ignore[no-any-return]
        q_BSND, k_BSKD, cos.float(), sin.float(), positions, interleaved, False
    )


def rope_(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rope` in place of q and k, which may be views of one projection; not differentiable. Returns (q, k)."""
    check_rope(q_BSND, k_BSKD, cos, sin, positions)
    _check_dtype("rope_", q_BSND)
    rotate = _late("rope", "rotate_in_place")
    return rotate(q_BSND, k_BSKD, cos.float(), sin.float(), positions, interleaved)  # type: ignore[no-any-return]


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, cos, sin, positions, ctx.interleaved, ctx.backward = inputs
    ctx.set_materialize_grads(False)
    ctx.shapes = q.shape, k.shape
    ctx.save_for_backward(cos, sin, positions)


def _differentiate_rope(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    given = dk if dq is None else dq
    if given is None:
        return (None,) * 7
    dq = given.new_zeros(ctx.shapes[0]) if dq is None else dq
    dk = given.new_zeros(ctx.shapes[1]) if dk is None else dk
    dq, dk = torch.ops.megapre_triton.rope(dq, dk, cos, sin, positions, ctx.interleaved, not ctx.backward)
    return dq, dk, None, None, None, None, None


# gelu, swiglu, geglu


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """As `kernels.gelu.reference`."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f'gelu: approximate is {approximate!r}; it can be "tanh" or "none"')
    _check_dtype("gelu", x)
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


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _differentiate_gated(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.megapre_triton.gated_backward(dy, *ctx.saved_tensors, ctx.kind), None


def _save_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _differentiate_gelu(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.megapre_triton.gelu_backward(dy, x, bias, ctx.kind)
    return dx, None if bias is None else dbias, None


def _fake_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(0) if bias is None else _like(bias)


# cross_entropy, linear_cross_entropy


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
) -> Tensor:
    """As `kernels.linear_cross_entropy.reference`; weight is taken and logits are rounded in the dtype of x."""
    vocab = check_linear_cross_entropy(x_TH, weight_VH, labels_T, vocab)
    _check_dtype("linear_cross_entropy", x_TH)
    weight = weight_VH.to(x_TH.dtype)
    settings = (ignore_index, label_smoothing, z_loss, vocab)
    grad = torch.is_grad_enabled()
    need_dx, need_dweight = grad and x_TH.requires_grad, grad and weight.requires_grad
    # In fp16 gradients would underflow when the upstream one (one over the tokens) comes in before they are rounded.
    if (need_dx or need_dweight) and x_TH.dtype != torch.float16 and one_chunk(x_TH, weight):
        loss, _, _ = torch.ops.megapre_triton.linear_cross_entropy_kept(x_TH, weight, labels_T, *settings)
        return loss  # type: ignore[no-any-return]
    loss, _, _ = torch.ops.megapre_triton.linear_cross_entropy(x_TH, weight, labels_T, *settings, need_dx, need_dweight)
    return loss  # type: ignore[no-any-return]


def one_chunk(x: Tensor, weight: Tensor) -> bool:
    """Whether all logits fit one chunk (linear_cross_entropy.py), so that they can be kept for the backward."""
    return x.shape[0] <= most_rows(weight.shape[0], x.element_size())


def most_rows(vocab: int, element_size: int) -> int:
    """Rows whose logits fit a chunk of about 1 GiB; at least 1024."""
    return max((1 << 30) // (max(vocab, 1) * element_size), 1024)


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, output[1])


def _differentiate_cross_entropy(ctx: Any, dlosses: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dlogits = torch.ops.megapre_triton.cross_entropy_backward(dlosses, *ctx.saved_tensors, *ctx.settings)
    return dlogits, None, None, None, None, None


def _save_kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, labels, *ctx.settings = inputs
    _, logits, lse = output
    ctx.needs = x.requires_grad, weight.requires_grad
    ctx.mark_non_differentiable(logits, lse)
    ctx.save_for_backward(logits, lse, x, weight, labels)


def _differentiate_kept(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight = torch.ops.megapre_triton.linear_cross_entropy_kept_backward(
        dloss, *ctx.saved_tensors, *ctx.settings, *ctx.needs
    )
    return dx if ctx.needs[0] else None, dweight if ctx.needs[1] else None, *(None,) * 5


def _fake_kept_backward(
    dloss: Tensor, logits: Tensor, lse: Tensor, x: Tensor, weight: Tensor, labels: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    need_dx, need_dweight = settings[-2:]
    return x.new_empty(x.shape if need_dx else 0), x.new_empty(weight.shape if need_dweight else 0)


def _fake_chunks(x: Tensor, weight: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_dweight = settings[-2:]
    dweight = x.new_empty(weight.shape if need_dweight else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape if need_dx else 0), dweight


def _save_chunks(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dx, dweight = output
    ctx.needs = inputs[-2:]
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(dx, dweight)


def _differentiate_chunks(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight = torch.ops.megapre_triton.linear_cross_entropy_scale(dloss, *ctx.saved_tensors)
    return dx if ctx.needs[0] else None, dweight if ctx.needs[1] else None, *(None,) * 7


# attention


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
    _check_dtype("attention", q_BSND)
    scale = 1.0 / math.sqrt(q_BSND.shape[-1]) if scale is None else scale
    o, lse, _ = torch.ops.megapre_triton.attention(q_BSND, k_BSKD, v_BSKD, causal, cu_seqlens, window, scale)
    return (o, lse) if return_lse else o


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


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    bounds = q.new_empty(0 if cu_seqlens is None else (2, batch, queries), dtype=torch.int32)
    return _like(q), q.new_empty(batch, heads, queries, dtype=torch.float32), bounds


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, _, ctx.window, ctx.scale = inputs
    o, lse, bounds = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(bounds)
    ctx.save_for_backward(q, k, v, o, lse, bounds)


def _differentiate_attention(
    ctx: Any, do: Tensor | None, dlse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, bounds = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = torch.ops.megapre_triton.attention_backward(
        do, dlse, q, k, v, o, lse, bounds, ctx.causal, ctx.window, ctx.scale
    )
    return *grads, None, None, None, None


# adamw_, grad_norm


@torch.no_grad()
def adamw_(
    param: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """As `kernels.adamw.reference`, for fp32 states."""
    check_adamw(param, master, exp_avg, exp_avg_sq, grad)
    separate = None if param is master else param  # a schema must not name one tensor twice among what it writes
    torch.ops.megapre_triton.adamw_(
        separate, master, exp_avg, exp_avg_sq, grad, lr, step, beta1, beta2, eps, weight_decay, grad_scale, found_inf
    )


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """As `kernels.grad_norm.reference`."""
    for grad in grads:
        _check_dtype("grad_norm", grad)
    return torch.ops.megapre_triton.grad_norm(list(grads))  # type: ignore[no-any-return]


_TERMS = "int ignore_index, float label_smoothing, float z_loss, int vocab"

# (schema, module, function, fake)
_OPS: tuple[tuple[str, str, str, Callable[..., Any]], ...] = (
    (
        "norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual, bool centred) "
        "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
        "norm",
        "forward",
        _fake_norm,
    ),
    (
        "norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor mean, Tensor rstd, bool centred, "
        "bool bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        "norm",
        "backward",
        lambda dy, dh, h, weight, mean, rstd, centred, bias: (
            _like(h),
            _like(weight),
            weight.new_empty(weight.shape if bias else 0),
        ),
    ),
    (
        "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool backward) "
        "-> (Tensor q_out, Tensor k_out)",
        "rope",
        "rotate",
        lambda q, k, *_: (_like(q), _like(k)),
    ),
    ("gelu(Tensor x, Tensor? bias, int kind) -> Tensor", "activation", "gelu_forward", lambda x, *_: _like(x)),
    (
        "gelu_backward(Tensor dy, Tensor x, Tensor? bias, int kind) -> (Tensor dx, Tensor dbias)",
        "activation",
        "gelu_backward",
        _fake_gelu_backward,
    ),
    (
        "gated(Tensor x, int kind) -> Tensor",
        "activation",
        "gated_forward",
        lambda x, kind: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    ),
    (
        "gated_backward(Tensor dy, Tensor x, int kind) -> Tensor",
        "activation",
        "gated_backward",
        lambda dy, x, kind: _like(x),
    ),
    (
        f"cross_entropy(Tensor logits, Tensor labels, {_TERMS}) -> (Tensor losses, Tensor lse)",
        "cross_entropy",
        "forward",
        lambda logits, *_: (_rows(logits), _rows(logits)),
    ),
    (
        f"cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, Tensor lse, {_TERMS}) -> Tensor",
        "cross_entropy",
        "gradient",
        lambda dlosses, logits, *_: _like(logits),
    ),
    (
        f"linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, {_TERMS}, bool need_dx, bool need_dweight) "
        "-> (Tensor loss, Tensor dx, Tensor dweight)",
        "linear_cross_entropy",
        "forward_chunks",
        _fake_chunks,
    ),
    (
        "linear_cross_entropy_scale(Tensor dloss, Tensor dx, Tensor dweight) -> (Tensor dx, Tensor dweight)",
        "linear_cross_entropy",
        "scale_chunks",
        lambda dloss, dx, dweight: (_like(dx), dx.new_empty(dweight.shape)),
    ),
    (
        f"linear_cross_entropy_kept(Tensor x, Tensor weight, Tensor labels, {_TERMS}) "
        "-> (Tensor loss, Tensor logits, Tensor lse)",
        "linear_cross_entropy",
        "forward_one_chunk",
        lambda x, weight, *_: (
            x.new_empty((), dtype=torch.float32),
            x.new_empty(x.shape[0], weight.shape[0]),
            _rows(x),
        ),
    ),
    (
        "linear_cross_entropy_kept_backward(Tensor dloss, Tensor(a!) logits, Tensor lse, Tensor x, Tensor weight, "
        f"Tensor labels, {_TERMS}, bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)",
        "linear_cross_entropy",
        "backward_one_chunk",
        _fake_kept_backward,
    ),
    (
        "attention(Tensor q, Tensor k, Tensor v, bool causal, Tensor? cu_seqlens, SymInt? window, float scale) "
        "-> (Tensor o, Tensor lse, Tensor bounds)",
        "attention",
        "forward_with_documents",
        _fake_attention,
    ),
    (
        "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
        "Tensor bounds, bool causal, SymInt? window, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
        "attention_backward",
        "backward",
        lambda do, dlse, q, k, v, *_: (_like(q), _like(k), _like(v)),
    ),
    (
        "adamw_(Tensor(a!)? param, Tensor(b!) master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor grad, "
        "Tensor lr, Tensor step, float beta1, float beta2, float eps, float weight_decay, Tensor? grad_scale, "
        "Tensor? found_inf) -> ()",
        "adamw",
        "step_",
        lambda *_: None,
    ),
    (
        "grad_norm(Tensor[] grads) -> Tensor",
        "grad_norm",
        "norm",
        lambda grads: torch.empty((), dtype=torch.float32, device=grads[0].device if grads else "cpu"),
    ),
)

_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "norm": (_save_norm, _differentiate_norm),
    "rope": (_save_rope, _differentiate_rope),
    "gelu": (_save_gelu, _differentiate_gelu),
    "gated": (_save_gated, _differentiate_gated),
    "cross_entropy": (_save_cross_entropy, _differentiate_cross_entropy),
    "linear_cross_entropy": (_save_chunks, _differentiate_chunks),
    "linear_cross_entropy_kept": (_save_kept, _differentiate_kept),
    "attention": (_save_attention, _differentiate_attention),
}
