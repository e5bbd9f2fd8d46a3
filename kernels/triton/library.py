"""The Triton kernels as torch ops (`torch.ops.megapre_triton.*`): schemas, fake tensors, autograd.

Where an op can be differentiated its backward is an op too, so torch.compile calls the kernels as they are and compiles
what lies between them.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adamw import UPDATE

NAMESPACE = "megapre_triton"


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
        library.impl(name, late(module, function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    for name, (save, differentiate) in _GRADIENTS.items():
        torch.library.register_autograd(f"{NAMESPACE}::{name}", differentiate, setup_context=save, lib=library)
    return library


def late(module: str, function: str) -> Callable[..., Any]:
    """The function of a kernel's module, which is imported, and Triton with it, by the first call.

    Its kernels are launched on the device of the first CUDA tensor among the arguments, in that device's current
    stream: Triton takes the current device, whatever the pointers are, and torch sets none for ops written in Python.
    """

    def call(*arguments: Any) -> Any:
        called = getattr(importlib.import_module(f".{module}", __package__), function)
        device = next((device for argument in arguments if (device := _cuda_device(argument)) is not None), None)
        if device is None or device.index == torch.cuda.current_device():
            return called(*arguments)
        with torch.cuda.device(device):
            return called(*arguments)

    return call


def _cuda_device(argument: object) -> torch.device | None:
    first = argument[0] if isinstance(argument, list) and argument else argument
    return first.device if isinstance(first, Tensor) and first.is_cuda else None


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


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
        "cross_entropy_local(Tensor logits, Tensor labels, int vocab_start, int vocab, int ignore_index, "
        "bool label_smoothing) -> Tensor stats",
        "vocab_parallel",
        "local",
        lambda logits, *rest: logits.new_empty(logits.shape[0], 4 if rest[-1] else 3, dtype=torch.float32),
    ),
    (
        "cross_entropy_merge(Tensor stats, Tensor labels, int vocab, int ignore_index, float label_smoothing, "
        "float z_loss) -> (Tensor losses, Tensor lse)",
        "vocab_parallel",
        "merge",
        lambda stats, *_: (stats.new_empty(stats.shape[1]), stats.new_empty(stats.shape[1])),
    ),
    (
        "cross_entropy_local_backward_(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor? dlosses, "
        "int vocab_start, int vocab, int ignore_index, float label_smoothing, float z_loss) -> ()",
        "vocab_parallel",
        "gradient_",
        lambda *_: None,
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
        f"{UPDATE}) -> ()",
        "adamw",
        "step_",
        lambda *_: None,
    ),
    (
        "adamw_stochastic_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, "
        f"{UPDATE}, int seed, int offset) -> ()",
        "adamw_stochastic",
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
