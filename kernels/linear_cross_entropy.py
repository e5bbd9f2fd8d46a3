"""The last linear layer and its cross-entropy in one op: the logits exist only a chunk of rows at a time.

    loss = sum over valid rows of cross_entropy(x W^T)                 (the terms of cross_entropy.py, same arguments)
    dx = dlogits W;   dW = dlogits^T x

Shapes   x [T, H]; weight [V, H]; labels [T] int64; loss a 0-dim fp32 sum (the caller divides by the global number of
         valid tokens). Rows of weight >= vocab are padding: no logits, and a gradient of 0.
Forward  2 T V H FLOPs; with gradients 6 T V H, all done in the forward pass with an upstream gradient of one, because
         then the logits of a chunk are still there; the backward multiplies by the upstream scalar, on the device. A
         caller who knows that scalar beforehand saves the multiplication, and dW's own memory where W has a sink.
Memory   one chunk of logits (rows * V <= MAX_LOGITS), dx in the dtype of x, dW in fp32; never [T, V].
Bytes    a chunk reads W twice, x and writes dx; its logits are written by the product, turned into their gradient in
         place and read by two products; fp32 dW is read and written once a chunk.
Floor    products: 6 T V H / product rate.
Measured bf16 T 2048, H 768, V 50304: loss 0.42 s, with all gradients 1.28 s; the three products at the rates of
         linear.py 1.09 s; a product and F.cross_entropy on its fp32 copy 0.48 and 1.40 s.
         AMD EPYC (Zen 4, AVX-512 bf16), two threads, torch 2.13, minimum of 25, 2026-11-21.
         Triton in its present form: not yet run on a GPU.

Weights whose rows lie in shards: vocab_parallel_linear_cross_entropy.py.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import library
from .cross_entropy import check, check_labels
from .cross_entropy import reference as cross_entropy
from .gradient_sink import sink_of
from .precision import wide

# Logits that exist at a time: 2^25 are 64 MiB in bf16, or 667 rows of GPT-2's vocabulary.
MAX_LOGITS = {"cpu": 2**25, "cuda": 2**29}
LEAST_ROWS = 256


def reference(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab: int | None = None,
    upstream: Tensor | None = None,
) -> Tensor:
    """Plain torch with whole fp32 logits, the definition of correct. The sum of the losses of valid rows, 0-dim fp32.

    `upstream` (0-dim) is the caller's promise of the gradient that the backward will bring, for implementations that
    make gradients in the forward; it changes no result. ValueError as `cross_entropy.reference`, and when x and weight
    differ in width.
    """
    check_shapes(x_TH, weight_VH, labels_T, vocab)
    with torch.autocast(x_TH.device.type, enabled=False):
        logits = x_TH.to(wide(x_TH.dtype)) @ weight_VH.to(wide(x_TH.dtype)).T
    return cross_entropy(logits, labels_T, ignore_index, label_smoothing, z_loss, vocab).sum()


def chunked(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab: int | None = None,
    upstream: Tensor | None = None,
) -> Tensor:
    """Through `megapre::linear_cross_entropy`; logits are rounded to the dtype of x. As `reference`.

    The weight is taken in the dtype of x (autocast). Gradients are computed only for inputs that require them. Where
    `upstream` is given and the weight has a sink (gradient_sink.py), dW goes straight into it, during the forward.
    """
    vocab = check_shapes(x_TH, weight_VH, labels_T, vocab)
    weight = weight_VH.to(x_TH.dtype)
    needs = torch.is_grad_enabled()
    settings = (ignore_index, label_smoothing, z_loss, vocab, MAX_LOGITS[x_TH.device.type])
    if upstream is not None and weight is weight_VH and sink_of(weight) is not None:
        return _IntoSink.apply(x_TH, weight, labels_T, upstream, *settings)  # type: ignore[no-any-return]
    loss, _, _ = torch.ops.megapre.linear_cross_entropy(
        x_TH, weight, labels_T, *settings, needs and x_TH.requires_grad, needs and weight.requires_grad
    )
    return loss  # type: ignore[no-any-return]


def check_shapes(x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, vocab: int | None) -> int:
    """The number of rows of weight that exist. ValueError as `reference`."""
    if x_TH.dim() != 2 or weight_VH.dim() != 2 or x_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: need x [T, H] and weight [V, H]; they are {tuple(x_TH.shape)} and "
            f"{tuple(weight_VH.shape)}"
        )
    return check(torch.Size((x_TH.shape[0], weight_VH.shape[0])), labels_T, vocab)


def chunk_rows(rows: int, columns: int, max_logits: int) -> int:
    """Rows of a chunk: as few and as equal chunks as max_logits allows, but no fewer than LEAST_ROWS in a chunk.

    Below that the products run at a lower rate, and dW is read and written more often than the logits themselves.
    """
    most = max(max_logits // columns, LEAST_ROWS)
    chunks = max(-(-rows // most), 1)
    return -(-rows // chunks)


# The registered op: the kernel over chunks, fake tensors, autograd.


def _forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab: int,
    max_logits: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape) if need_dx else None
    dweight = x.new_empty(weight.shape, dtype=wide(x.dtype)) if need_dweight else None
    check_labels(labels, ignore_index, vocab)
    of_chunk = partial(_of_whole_rows, (ignore_index, label_smoothing, z_loss, vocab))
    loss = in_chunks(x, weight, labels, None, of_chunk, max_logits, dx, dweight, False).sum()
    return loss, x.new_empty(0) if dx is None else dx, loss.new_empty(0) if dweight is None else dweight


def _forward_into_(
    dweight: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor,
    accumulate: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab: int,
    max_logits: int,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape) if need_dx else None
    check_labels(labels, ignore_index, vocab)
    of_chunk = partial(_of_whole_rows, (ignore_index, label_smoothing, z_loss, vocab))
    loss = in_chunks(x, weight, labels, upstream, of_chunk, max_logits, dx, dweight, accumulate).sum()
    return loss, x.new_empty(0) if dx is None else dx


CrossEntropy = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]
"""Of a chunk: (logits, labels, dlosses, whether a gradient is wanted) -> the losses of its rows. Where it is wanted the
logits become it, times dlosses where there are some."""


def _of_whole_rows(
    settings: tuple[int, float, float, int], logits: Tensor, labels: Tensor, dlosses: Tensor | None, gradient: bool
) -> Tensor:
    if gradient:
        return torch.ops.megapre.cross_entropy_(logits, labels, dlosses, *settings)  # type: ignore[no-any-return]
    return torch.ops.megapre.cross_entropy(logits, labels, *settings)[0]  # type: ignore[no-any-return]


def in_chunks(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor | None,
    cross_entropy: CrossEntropy,
    max_logits: int,
    dx: Tensor | None,
    dweight: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """The losses [T]; writes dx and dweight (adds to it where `accumulate`). `upstream` None means one."""
    losses = x.new_empty(x.shape[0], dtype=wide(x.dtype))
    rows = chunk_rows(x.shape[0], weight.shape[0], max_logits)
    if rows == 0 and dweight is not None and not accumulate:
        dweight.zero_()
    logits = x.new_empty(rows, weight.shape[0])
    scale = None if upstream is None else upstream.to(losses.dtype).expand(rows).contiguous()
    gradient = dx is not None or dweight is not None
    ops = torch.ops.megapre
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[0], rows or 1):
            chunk = slice(start, min(start + rows, x.shape[0]))
            dlogits = logits[: chunk.stop - chunk.start]
            ops.linear_(dlogits, x[chunk], weight, None)
            dlosses = None if scale is None else scale[: len(dlogits)]
            losses[chunk] = cross_entropy(dlogits, labels[chunk], dlosses, gradient)
            if dx is not None:
                ops.linear_input_gradient_(dx[chunk], dlogits, weight)
            if dweight is not None:
                ops.linear_weight_gradient_(dweight, None, dlogits, x[chunk], accumulate or start > 0)
    return losses


class _IntoSink(torch.autograd.Function):
    """The op whose weight gradient is written where its owner wants it, for an upstream gradient known beforehand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, *settings: Any) -> Tensor:
        dweight, accumulate = weight.gradient_sink()  # type: ignore[attr-defined]
        loss, dx = torch.ops.megapre.linear_cross_entropy_into_(
            dweight, x, weight, labels, upstream, accumulate, *settings, ctx.needs_input_grad[0]
        )
        weight.gradient_sink.written()  # type: ignore[attr-defined]
        ctx.save_for_backward(dx, upstream)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, upstream = ctx.saved_tensors
        check_promise(dloss, upstream)
        return dx if ctx.needs_input_grad[0] else None, *(None,) * 8


def check_promise(dloss: Tensor, upstream: Tensor) -> None:
    """ValueError when the backward brings another gradient than was promised.

    `loss.backward(upstream)` brings that very tensor. Another one is looked at on the CPU only, where it costs no wait.
    """
    if dloss.data_ptr() == upstream.data_ptr() or dloss.device.type != "cpu" or bool(dloss.isnan()):
        return
    if dloss.item() != upstream.item():
        raise ValueError(
            f"linear_cross_entropy: its gradient was made for upstream = {upstream.item()}, "
            f"and the backward brings {dloss.item()}"
        )


def _blocks(like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a matrix that stay in a core's cache, each with scratch space of its shape and dtype.

    Adding bf16 to fp32, torch first makes a whole fp32 copy, and fresh memory of that size is page faults: 84 ms for 39
    million elements, against 14 ms when they are converted and added block by block.
    """
    rows = max(2**18 // max(like.shape[1], 1), 1)
    scratch = like.new_empty(min(rows, len(like)), like.shape[1])
    for start in range(0, len(like), rows):
        block = slice(start, min(start + rows, len(like)))
        yield block, scratch[: block.stop - start]


def _forward_fake(x: Tensor, weight: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_dweight = settings[-2:]
    return (
        x.new_empty((), dtype=wide(x.dtype)),
        x.new_empty(x.shape if need_dx else 0),
        x.new_empty(weight.shape if need_dweight else 0, dtype=wide(x.dtype)),
    )


def _backward(dloss: Tensor, dx: Tensor, dweight: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dweight.device.type == "cuda":  # a 16-bit dx would make torch round the upstream gradient to 16 bits as well
        return (dx.to(dloss.dtype) * dloss).to(dx.dtype), (dweight * dloss).to(weight_dtype)
    if dweight.dtype == weight_dtype or dweight.dim() < 2:
        return dx * dloss, (dweight * dloss).to(weight_dtype)
    scaled = dweight.new_empty(dweight.shape, dtype=weight_dtype)
    for block, scratch in _blocks(dweight):
        scaled[block] = torch.mul(dweight[block], dloss, out=scratch)
    return dx * dloss, scaled


def _backward_fake(dloss: Tensor, dx: Tensor, dweight: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dx.new_empty(dx.shape), dweight.new_empty(dweight.shape, dtype=weight_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dx, dweight = output
    ctx.weight_dtype = inputs[1].dtype
    ctx.need_dx, ctx.need_dweight = inputs[-2:]
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(dx, dweight)


def _differentiate(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight = torch.ops.megapre.linear_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.weight_dtype)
    return dx if ctx.need_dx else None, dweight if ctx.need_dweight else None, *(None,) * 8


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::linear_cross_entropy`, its backward, which only scales, and the form that adds to a sink."""
    library.add(
        ops,
        "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, int ignore_index, float label_smoothing, "
        "float z_loss, int vocab, int max_logits, bool need_dx, bool need_dweight) "
        "-> (Tensor loss, Tensor dx, Tensor dweight)",
        _forward,
        _forward_fake,
    )
    library.add(
        ops,
        "linear_cross_entropy_into_(Tensor(a!) dweight, Tensor x, Tensor weight, Tensor labels, Tensor upstream, "
        "bool accumulate, int ignore_index, float label_smoothing, float z_loss, int vocab, int max_logits, "
        "bool need_dx) -> (Tensor loss, Tensor dx)",
        _forward_into_,
        lambda dweight, x, *rest: (x.new_empty((), dtype=wide(x.dtype)), x.new_empty(x.shape if rest[-1] else 0)),
    )
    library.add(
        ops,
        "linear_cross_entropy_backward(Tensor dloss, Tensor dx, Tensor dweight, ScalarType weight_dtype) "
        "-> (Tensor dx, Tensor dweight)",
        _backward,
        _backward_fake,
    )
    torch.library.register_autograd("megapre::linear_cross_entropy", _differentiate, setup_context=_save, lib=ops)
