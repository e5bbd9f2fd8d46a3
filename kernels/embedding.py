"""Rows of a table by their numbers; its gradient is summed in fp32.

    y_t = W[id_t];   dW[v] = sum over t with id_t = v of dy_t

Shapes   ids of any shape, int64 below V; weight [V, H]; y [..., H]; T ids.
FLOPs    none forward; T H additions backward.
Bytes    T H elements read and written; backward dy read and T H fp32 read and written, in a buffer of V H that must be
         zero, or hold other gradients, beforehand.
Floor    memory: bytes / copy rate.

torch's CPU kernel adds the gradients of a row's occurrences in the dtype of the table. In bf16 that sum stops at
256 times an addend, and a frequent token (a comma is every twentieth) gets a gradient that is wrong in its first digit.
torch's CUDA kernel sums in fp32 already, and is used there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library
from .gradient_sink import sink_of
from .precision import wide


def reference(ids: Tensor, weight_VH: Tensor) -> Tensor:
    """Plain torch, the definition of correct: [...] -> [..., H] in the dtype of weight.

    IndexError for an id outside it.
    """
    return F.embedding(ids, weight_VH.to(wide(weight_VH.dtype))).to(weight_VH.dtype)


def torch_embedding(ids: Tensor, weight_VH: Tensor) -> Tensor:
    """Through F.embedding, whose gradient on the CPU is summed in the dtype of weight. As `reference`."""
    return F.embedding(ids, weight_VH)


def summed(ids: Tensor, weight_VH: Tensor) -> Tensor:
    """Through `megapre::embedding`, whose gradient is summed in fp32 and goes into weight's sink, if it has one."""
    if sink_of(weight_VH) is not None:
        return _IntoSink.apply(ids, weight_VH)  # type: ignore[no-any-return]
    return torch.ops.megapre.embedding(ids, weight_VH)  # type: ignore[no-any-return]


class _IntoSink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None]:
        (ids,) = ctx.saved_tensors
        total, accumulate = ctx.weight.gradient_sink()
        torch.ops.megapre.embedding_gradient_(total, dy.reshape(-1, dy.shape[-1]), ids.flatten(), accumulate)
        ctx.weight.gradient_sink.written()
        return None, None


# The registered ops: kernels in plain torch, fake tensors, autograd.


def _gradient_(total: Tensor, dy_TH: Tensor, ids_T: Tensor, accumulate: bool) -> None:
    """Sums are made in [T, H] and not in [V, H], of which few rows occur. All shapes are static."""
    sorted_T, order_T = ids_T.sort(stable=True)
    run_T = F.pad((sorted_T[1:] != sorted_T[:-1]).cumsum(0), (1, 0))[: len(sorted_T)]  # which run of equal ids
    sums_TH = torch.zeros(dy_TH.shape, dtype=wide(dy_TH.dtype), device=dy_TH.device)
    sums_TH.index_add_(0, run_T, dy_TH[order_T].to(sums_TH.dtype))
    rows_TH = sums_TH[run_T]
    if accumulate:
        rows_TH = rows_TH + total[sorted_T]
    else:
        total.zero_()
    # Several t may write the same row; they all write the same sum.
    total.index_copy_(0, sorted_T, rows_TH.to(total.dtype))


def _backward(dy: Tensor, ids: Tensor, rows: int) -> Tensor:
    dweight = dy.new_empty(rows, dy.shape[-1])
    torch.ops.megapre.embedding_gradient_(dweight, dy.reshape(-1, dy.shape[-1]), ids.flatten(), False)
    return dweight


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.rows = inputs[1].shape[0]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
    return None, torch.ops.megapre.embedding_backward(dy, *ctx.saved_tensors, ctx.rows)


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::embedding`, its backward, and the sum into given memory."""
    library.add(
        ops,
        "embedding_gradient_(Tensor(a!) total, Tensor dy, Tensor ids, bool accumulate) -> ()",
        _gradient_,
        lambda *_: None,
    )
    library.add(
        ops,
        "embedding(Tensor ids, Tensor weight) -> Tensor",
        lambda ids, weight: F.embedding(ids, weight),
        lambda ids, weight: weight.new_empty(*ids.shape, weight.shape[1]),
    )
    library.add(
        ops,
        "embedding_backward(Tensor dy, Tensor ids, SymInt rows) -> Tensor",
        _backward,
        lambda dy, ids, rows: dy.new_empty(rows, dy.shape[-1]),
    )
    torch.library.register_autograd("megapre::embedding", _differentiate, setup_context=_save, lib=ops)
