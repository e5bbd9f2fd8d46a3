"""A linear layer: one product forward, two backward.

    y = x W^T + b;   dx = dy W;   dW = dy^T x;   db = sum over rows of dy

Shapes   x [..., I], T rows of I inputs; weight [O, I], O outputs; bias [O]; y [..., O].
FLOPs    2 T I O for each of the three.
Bytes    x, W read and y written; dy, W read and dx written; dy, x read and dW (fp32 where there is a sink) written.
Floor    products: FLOPs / product rate.

Sums are in fp32. On the CPU the 16-bit products are cut into tiles over oneDNN's micro-kernels (csrc/cpu/linear.cpp),
whose operands are packed on the way; what torch's own products do not do is to add dW to an fp32 buffer as they make it
(see gradient_sink.py), to sum db while they transpose dy, and to add b before y is rounded. On CUDA the products are
torch's, and dW is added to an fp32 buffer by cuBLAS (wide_product.py; not yet run on a GPU).

Measured bf16 T 2048, I 768, O 3072, 2 threads, GFLOP/s: y 431, dx 434, dW added to fp32 425; torch's 431, 432, and 425
         without the addition. O 50304: 433, 439, 431 against 422, 403, 413. A register-only loop: 470.
         AMD EPYC (Zen 4, AVX-512 bf16), torch 2.13, 2026-11-21.
         Where the CPU has no products of the dtype the vector loops are preferred all the more. T 512, forward and
         backward, torch's in brackets: bf16 held to AVX2 164 and 170 (41, 4), to plain AVX-512 182 and 189 (67, 64), to
         neither 37 and 32 (13, 3); fp16 85 and 89 (36, 3) with AVX2, 81 and 81 (36, 3) with AVX-512. Not measured: Arm.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library
from .gradient_sink import GradientSink, sink_in_backward, sink_of
from .precision import wide
from .wide_product import write_product


def reference(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain torch, the definition of correct: [..., I] -> [..., O] in the dtype of x.

    ValueError when shapes disagree.
    """
    _check(x, weight_OI, bias)
    dtype = wide(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(dtype) @ weight_OI.to(dtype).T
        return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def torch_linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    """Through F.linear. As `native`."""
    _check(x, weight_OI, bias)
    x, weight_OI, bias = _as_autocast(x, weight_OI, bias)
    if _have_sinks(weight_OI, bias):
        return _IntoSinks.apply(products(torch_linear), x, weight_OI, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight_OI, bias)


def native(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    """Through `megapre::linear`. As `reference`; under autocast in autocast's dtype, as F.linear.

    Gradients of weight and bias go into their sinks, if they have any.
    """
    _check(x, weight_OI, bias)
    x, weight_OI, bias = _as_autocast(x, weight_OI, bias)
    if _have_sinks(weight_OI, bias):
        return _IntoSinks.apply(products(native), x, weight_OI, bias)  # type: ignore[no-any-return]
    return torch.ops.megapre.linear(x, weight_OI, bias)  # type: ignore[no-any-return]


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _have_sinks(weight: Tensor, bias: Tensor | None) -> bool:
    return sink_of(weight) is not None and (bias is None or sink_of(bias) is not None)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: need x [..., I] and weight [O, I]; they are {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias is {tuple(bias.shape)}; weight {tuple(weight.shape)} needs [{weight.shape[0]}]")


# The three products by themselves, for a layer whose ranks communicate in between.


class Products(NamedTuple):
    """Each as the function of the same name below, outside of autograd."""

    product: Callable[..., Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor]
    weight_gradients: Callable[..., tuple[Tensor | None, Tensor | None]]


def products(linear: Callable[..., Tensor]) -> Products:
    """What `linear`, a row of the registry, is made of. ValueError for another function."""
    if linear is native:
        return Products(product, input_gradient, weight_gradients)
    if linear is torch_linear:
        return Products(F.linear, torch.matmul, _torch_weight_gradients)
    if linear is reference:
        return Products(reference, _reference_input_gradient, partial(_plain_weight_gradients, wide))
    name = getattr(linear, "__name__", repr(linear))
    raise ValueError(f"linear: {name} has no products of its own; there are those of native, torch and reference")


class _IntoSinks(torch.autograd.Function):
    """A linear layer by its products, whose weight and bias gradients are written where their owner wants them."""

    @staticmethod
    def forward(ctx: Any, by: Products, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by, ctx.weight, ctx.bias = by, weight, bias  # the parameters for their sinks, not their values
        return by.product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = ctx.by.input_gradient(dy, weight) if ctx.needs_input_grad[1] else None
        return None, dx, *ctx.by.weight_gradients(dy, x, ctx.weight, ctx.bias)


def product(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    """y, [..., I] -> [..., O], outside of autograd."""
    return _forward(x, weight_OI, bias)


def input_gradient(dy: Tensor, weight_OI: Tensor) -> Tensor:
    """dx, [..., O] -> [..., I]."""
    dx = dy.new_empty(*dy.shape[:-1], weight_OI.shape[1])
    torch.ops.megapre.linear_input_gradient_(dx.view(-1, dx.shape[-1]), dy.reshape(-1, dy.shape[-1]), weight_OI)
    return dx


def _reference_input_gradient(dy: Tensor, weight_OI: Tensor) -> Tensor:
    return (dy.to(wide(dy.dtype)) @ weight_OI.to(wide(dy.dtype))).to(dy.dtype)


def weight_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(dW, db) in the parameters' dtype; None for what needs none, and for both where they go into sinks.

    `weight` and `bias` are the parameters themselves, of which only the sinks matter here.
    """
    if _go_into_sinks(torch.ops.megapre.linear_weight_gradient_, dy, x, weight, bias):
        return None, None
    needs = (False, weight.requires_grad, bias is not None and bias.requires_grad)
    _, dweight, dbias = _backward(dy, x, weight, *needs)
    return dweight if needs[1] else None, dbias if needs[2] else None


def _torch_weight_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    if _go_into_sinks(_weight_gradient_, dy, x, weight, bias):
        return None, None
    return _plain_weight_gradients(lambda dtype: dtype, dy, x, weight, bias)


def _plain_weight_gradients(
    widened: Callable[[torch.dtype], torch.dtype], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    dy_TO, x_TI = dy.flatten(0, -2).to(widened(dy.dtype)), x.flatten(0, -2).to(widened(x.dtype))
    dweight = (dy_TO.T @ x_TI).to(weight.dtype) if weight.requires_grad else None
    return dweight, dy_TO.sum(0).to(bias.dtype) if bias is not None and bias.requires_grad else None


def _go_into_sinks(write: Callable[..., None], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the gradients have sinks; `write`, as linear_weight_gradient_, then puts them there when they are due."""
    sink = sink_in_backward(weight)
    if sink is None or not (bias is None or sink_in_backward(bias) is not None):
        return False
    values = x.detach()  # a call for later must not keep the graph that made x, and all that hangs on it
    sink.when_due(lambda: _into_sinks(write, dy, values, weight, bias))
    return True


def _into_sinks(write: Callable[..., None], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dy_TO, x_TI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    sink: GradientSink = weight.gradient_sink  # type: ignore[attr-defined]
    dweight, accumulate = sink()
    if bias is None:
        write(dweight, None, dy_TO, x_TI, accumulate)
        sink.written()
        return
    sink_of_bias: GradientSink = bias.gradient_sink  # type: ignore[attr-defined]
    dbias, accumulate_bias = sink_of_bias()
    assert accumulate_bias == accumulate, "weight and bias of a layer get their gradients together"
    sums = dbias if dbias.dtype == wide(dy.dtype) else dbias.to(wide(dy.dtype))
    write(dweight, sums, dy_TO, x_TI, accumulate)
    dbias.copy_(sums)
    sink.written()
    sink_of_bias.written()


# The registered ops: kernels in plain torch, fake tensors, autograd.


def _product_(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def _input_gradient_(dx: Tensor, dy: Tensor, weight: Tensor) -> None:
    torch.mm(dy, weight, out=dx)


def _weight_gradient_(dweight: Tensor, dbias: Tensor | None, dy: Tensor, x: Tensor, accumulate: bool) -> None:
    if dbias is not None:
        total = dy.sum(0, dtype=dbias.dtype)
        dbias.add_(total) if accumulate else dbias.copy_(total)
    write_product(dweight, dy.T, x, accumulate)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    torch.ops.megapre.linear_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), weight, bias)
    return y


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = input_gradient(dy, weight) if need_dx else dy.new_empty(0)
    dy_TO, x_TI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if not need_dweight:
        return dx, dy.new_empty(0), dy_TO.sum(0) if need_dbias else dy.new_empty(0)
    dweight = weight.new_empty(weight.shape)
    dbias = dy.new_empty(weight.shape[0] if need_dbias else 0, dtype=wide(dy.dtype))
    torch.ops.megapre.linear_weight_gradient_(dweight, dbias if need_dbias else None, dy_TO, x_TI, False)
    return dx, dweight, dbias.to(dy.dtype)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dy.new_empty(x.shape if need_dx else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
        dy.new_empty(weight.shape[0] if need_dbias else 0),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    gradients = torch.ops.megapre.linear_backward(dy, *ctx.saved_tensors, *needs)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::linear`, its backward, and the three products that write into given memory."""
    nothing = lambda *_: None  # noqa: E731 - the fake form of an op that only writes into its arguments
    library.add(ops, "linear_(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias) -> ()", _product_, nothing)
    library.add(ops, "linear_input_gradient_(Tensor(a!) dx, Tensor dy, Tensor weight) -> ()", _input_gradient_, nothing)
    library.add(
        ops,
        "linear_weight_gradient_(Tensor(a!) dweight, Tensor(b!)? dbias, Tensor dy, Tensor x, bool accumulate) -> ()",
        _weight_gradient_,
        nothing,
    )
    library.add(
        ops,
        "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        _forward,
        lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    )
    library.add(
        ops,
        "linear_backward(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight, bool need_dbias) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)",
        _backward,
        _backward_fake,
    )
    torch.library.register_autograd("megapre::linear", _differentiate, setup_context=_save, lib=ops)
