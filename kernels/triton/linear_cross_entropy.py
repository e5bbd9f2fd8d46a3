"""The last linear layer and its cross-entropy over chunks of rows: cuBLAS products around the cross-entropy in place.

    loss = sum over valid rows of cross_entropy(x W^T);   dx = dlogits W;   dW = dlogits^T x, accumulated in fp32

Floor    products: 6 T V H / product rate; T 4096, H 4096, V 128256 at 790 TFLOP/s: 16.3 ms. The rest must stay below
         7%: a walk over 1 GB of logits in place 0.5 ms, over fp32 dW (2.1 GB) 0.5 ms each way.
Measured 19.2 ms, 85% of the product rate (kernels_nvidia-h200_2026-11-20 in benchmarks/results).

Chunks hold about 1 GiB of logits: the larger, the less often fp32 dW is read and written.
One chunk (up to 4,096 rows of 128 Ki tokens, 10 thousand of 50 Ki): the forward keeps the logits and each row's lse;
the backward turns them into their gradient, the upstream gradient folded in, and multiplies. dW leaves the product's
fp32 accumulator rounded once, no walk over dW is left, and what is kept is no larger than dW. A second backward is
refused by autograd, because the first has used up the logits.
More chunks: the gradients are made in the forward pass, chunk by chunk, for an upstream gradient of one; the backward
multiplies by the true one on the device.
Where W has a gradient sink dW is added to it as the product makes it (loss_into_sink.py): one chunk in the backward;
more in the forward, if the caller says the upstream gradient beforehand. Not yet run on a GPU.
"""

import torch
from torch import Tensor

from ..wide_product import write_product
from . import cross_entropy
from .launch import ceil_div
from .ops import most_rows


def chunk_rows(rows: int, vocab: int, element_size: int) -> int:
    """Rows of one chunk: no more than `most_rows`, in chunks of nearly equal size."""
    most = most_rows(vocab, element_size)
    if rows <= most:
        return rows
    return min(ceil_div(ceil_div(rows, ceil_div(rows, most)), 128) * 128, rows)


def forward_one_chunk(x: Tensor, weight: Tensor, labels: Tensor, *settings: object) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logits [T, V], lse [T]); the logits are kept for `backward_one_chunk`."""
    logits = torch.mm(x, weight.T)
    losses, lse = cross_entropy.forward(logits, labels, *settings)  # type: ignore[arg-type]
    return losses.sum(), logits, lse


def backward_one_chunk(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), empty where not needed. The logits become their gradient."""
    turn_into_gradient(dloss, logits, lse, labels, (ignore_index, label_smoothing, z_loss, vocab))
    dx = torch.mm(logits, weight) if need_dx else x.new_empty(0)
    dweight = torch.mm(logits.T, x) if need_dweight else x.new_empty(0)
    return dx, dweight


def turn_into_gradient(
    dloss: Tensor, logits: Tensor, lse: Tensor, labels: Tensor, settings: tuple[int, float, float, int]
) -> None:
    """The logits that `forward_one_chunk` kept become their gradient, times `dloss`."""
    cross_entropy.gradient(dloss, logits, labels, lse, *settings, in_place=True)
    torch.autograd.graph.increment_version(logits)


def forward_chunks(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dweight in fp32) for an upstream gradient of one; the last two empty where not needed."""
    settings = (ignore_index, label_smoothing, z_loss, vocab)
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = x.new_empty(weight.shape if need_dweight else 0, dtype=torch.float32)
    into = dx if need_dx else None, dweight if need_dweight else None
    return in_chunks(x, weight, labels, settings, None, *into, accumulate=False), dx, dweight


def in_chunks(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: tuple[int, float, float, int],
    upstream: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """The loss; writes dx and dweight (adds to it where `accumulate`), if given. `upstream` None means one."""
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    rows = chunk_rows(x.shape[0], weight.shape[0], x.element_size())
    if rows == 0 and dweight is not None and not accumulate:
        dweight.zero_()
    logits = x.new_empty(rows, weight.shape[0])
    scale = None if upstream is None else upstream.float().expand(rows).contiguous()
    for start in range(0, x.shape[0], max(rows, 1)):
        part, targets = x[start : start + rows], labels[start : start + rows]
        here = torch.mm(part, weight.T, out=logits[: part.shape[0]])
        if dx is None and dweight is None:
            loss += cross_entropy.forward(here, targets, *settings)[0].sum()
            continue
        dlosses = None if scale is None else scale[: part.shape[0]]
        loss += cross_entropy.forward_in_place(here, targets, dlosses, *settings).sum()
        if dx is not None:
            torch.mm(here, weight, out=dx[start : start + rows])
        if dweight is not None:
            write_product(dweight, here.T, part, accumulate or start > 0)
    return loss


def scale_chunks(dloss: Tensor, dx: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dweight times the upstream gradient, both in the dtype of dx; one walk over each."""
    scaled = torch.empty(dx.shape, dtype=dx.dtype, device=dx.device)
    scaled_weight = torch.empty(dweight.shape, dtype=dx.dtype, device=dweight.device)
    # dx as fp32: beside a 16-bit tensor, torch would round the upstream gradient to 16 bits too.
    return torch.mul(dx.float(), dloss, out=scaled), torch.mul(dweight, dloss, out=scaled_weight)
