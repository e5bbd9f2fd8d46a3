"""Rows of a table by their numbers; its gradient is summed in fp32.

    y_t = W[id_t];   dW[v] = sum over t with id_t = v of dy_t

The table may be a shard of the vocabulary: rows vocab_start .. vocab_start + V - 1 of `vocab`. An id of another row
gets zeros and gives no gradient. The sum of y over all shards, which the caller makes, is that of the whole table; its
gradient dy must reach every rank whole.

Shapes   ids of any shape, int64 below vocab; weight [V, H]; y [..., H]; T ids.
FLOPs    none forward; T H additions backward.
Bytes    T H elements read and written; backward dy read and T H fp32 read and written, in a buffer of V H that must be
         zero, or hold other gradients, beforehand.
Floor    memory: bytes / copy rate.
Measured bf16 T 8192, H 768, V 50304: 0.68 ms, F.embedding 1.24; added to an fp32 gradient 4.0 ms. Its upper half as a
         shard: 0.58 ms, F.embedding with masks 3.2; gradient 1.9 ms. AMD EPYC (Zen 4, AVX-512 bf16), two threads,
         torch 2.13, minimum of 60, 2026-11-21.

torch's CPU kernel adds the gradients of a row's occurrences in the dtype of the table. In bf16 that sum stops at
256 times an addend, and a frequent token (a comma is every twentieth) gets a gradient that is wrong in its first digit.
torch's CUDA kernel sums in fp32 already, and is used there. The CUDA C++ form of the gradient (csrc/cuda/embedding.cu)
adds to a buffer given beforehand, in an order that depends on the ids alone; not yet run on a GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library
from .gradient_sink import sink_of
from .precision import wide


def reference(ids: Tensor, weight_VH: Tensor, vocab_start: int = 0, vocab: int | None = None) -> Tensor:
    """Plain torch, the definition of correct: [...] -> [..., H] in the dtype of weight.

    `vocab` None: the last row of weight is the last there is. IndexError for an id outside [0, vocab); on CUDA and
    inside torch.compile a shard does not look for such, and gives zeros. ValueError when vocab_start is negative.
    """
    return _rows(ids, weight_VH.to(wide(weight_VH.dtype)), vocab_start, vocab).to(weight_VH.dtype)


def torch_embedding(ids: Tensor, weight_VH: Tensor, vocab_start: int = 0, vocab: int | None = None) -> Tensor:
    """Through F.embedding, whose gradient on the CPU is summed in the dtype of weight. As `reference`."""
    return _rows(ids, weight_VH, vocab_start, vocab)


def summed(ids: Tensor, weight_VH: Tensor, vocab_start: int = 0, vocab: int | None = None) -> Tensor:
    """Through `megapre::embedding`, whose gradient is summed in fp32 and goes into weight's sink, if it has one."""
    if sink_of(weight_VH) is not None:
        return _IntoSink.apply(ids, weight_VH, vocab_start, vocab)  # type: ignore[no-any-return]
    return torch.ops.megapre.embedding(ids, weight_VH, vocab_start, vocab)  # type: ignore[no-any-return]


class _IntoSink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, vocab_start: int, vocab: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.shard = weight, (vocab_start, vocab)
        return torch.ops.megapre.embedding(ids, weight, vocab_start, vocab)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        total, accumulate = ctx.weight.gradient_sink()
        torch.ops.megapre.embedding_gradient_(
            total, dy.reshape(-1, dy.shape[-1]), ids.flatten(), accumulate, *ctx.shard
        )
        ctx.weight.gradient_sink.written()
        return None, None, None, None


def _rows(ids: Tensor, weight: Tensor, vocab_start: int, vocab: int | None) -> Tensor:
    if not vocab_start and vocab is None:
        return F.embedding(ids, weight)
    row, here = _in_shard(ids, weight.shape[0], vocab_start, vocab)
    return F.embedding(row, weight).where(here.unsqueeze(-1), 0.0)


def _in_shard(ids: Tensor, rows: int, vocab_start: int, vocab: int | None) -> tuple[Tensor, Tensor]:
    """The shard's row of each id, 0 where it is in another, and whether it is in this one."""
    vocab = vocab_start + rows if vocab is None else vocab
    if vocab_start < 0 or vocab < 0:
        raise ValueError(
            f"embedding: a shard of {rows} rows from row {vocab_start} on of {vocab}; neither can be negative"
        )
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (ids < 0) | (ids >= vocab)
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            raise IndexError(f"embedding: id {int(ids.flatten()[at])} of token {at} lies outside [0, {vocab})")
    row = ids - vocab_start
    here = (row >= 0) & (row < rows)
    return row.where(here, 0), here


# The registered ops: kernels in plain torch, fake tensors, autograd.


def _gradient_(
    total: Tensor, dy_TH: Tensor, ids_T: Tensor, accumulate: bool, vocab_start: int = 0, vocab: int | None = None
) -> None:
    """Sums are made in [T, H] and not in [V, H], of which few rows occur. All shapes are static."""
    if vocab_start or vocab is not None:
        ids_T, here_T = _in_shard(ids_T, total.shape[0], vocab_start, vocab)
        dy_TH = dy_TH.where(here_T.unsqueeze(1), 0.0)  # what is not here adds nothing to row 0
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


def _backward(dy: Tensor, ids: Tensor, rows: int, vocab_start: int = 0, vocab: int | None = None) -> Tensor:
    dweight = dy.new_empty(rows, dy.shape[-1])
    torch.ops.megapre.embedding_gradient_(
        dweight, dy.reshape(-1, dy.shape[-1]), ids.flatten(), False, vocab_start, vocab
    )
    return dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, *ctx.shard = inputs
    ctx.save_for_backward(ids)
    ctx.rows = weight.shape[0]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return None, torch.ops.megapre.embedding_backward(dy, *ctx.saved_tensors, ctx.rows, *ctx.shard), None, None


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::embedding`, its backward, and the sum into given memory."""
    shard = "int vocab_start=0, int? vocab=None"
    library.add(
        ops,
        f"embedding_gradient_(Tensor(a!) total, Tensor dy, Tensor ids, bool accumulate, {shard}) -> ()",
        _gradient_,
        lambda *_: None,
    )
    library.add(
        ops,
        f"embedding(Tensor ids, Tensor weight, {shard}) -> Tensor",
        lambda ids, weight, vocab_start=0, vocab=None: _rows(ids, weight, vocab_start, vocab),
        lambda ids, weight, *_: weight.new_empty(*ids.shape, weight.shape[1]),
    )
    library.add(
        ops,
        f"embedding_backward(Tensor dy, Tensor ids, SymInt rows, {shard}) -> Tensor",
        _backward,
        lambda dy, ids, rows, *_: dy.new_empty(rows, dy.shape[-1]),
    )
    torch.library.register_autograd("megapre::embedding", _differentiate, setup_context=_save, lib=ops)
