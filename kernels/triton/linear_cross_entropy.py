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
"""

import functools

import torch
from torch import Tensor

from . import cross_entropy
from .launch import ceil_div
from .ops import most_rows


def chunk_rows(rows: int, vocab: int, element_size: int) -> int:
    """Rows of one chunk: no more than `most_rows`, in chunks of nearly equal size."""
    most = most_rows(vocab, element_size)
    if rows <= most:
        return rows
    return min(ceil_div(ceil_div(rows, ceil_div(rows, most)), 128) * 128, rows)


@functools.cache
def _adds_in_fp32(device: torch.device) -> bool:
    """Whether torch adds a product of 16-bit matrices to an fp32 one in place here (since about 2.9): tried once."""
    try:
        total = torch.ones(16, 16, dtype=torch.float32, device=device)
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with total in fp32, in one product where torch can."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda" and _adds_in_fp32(a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.device.type == "cuda":
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total += a.float() @ b.float()


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
    cross_entropy.gradient(dloss, logits, labels, lse, ignore_index, label_smoothing, z_loss, vocab, in_place=True)
    torch.autograd.graph.increment_version(logits)
    dx = torch.mm(logits, weight) if need_dx else x.new_empty(0)
    dweight = torch.mm(logits.T, x) if need_dweight else x.new_empty(0)
    return dx, dweight


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
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = x.new_empty(0, dtype=torch.float32)
    if need_dweight:
        dweight = x.new_zeros(weight.shape, dtype=torch.float32)
    rows = chunk_rows(x.shape[0], weight.shape[0], x.element_size())
    logits = x.new_empty(rows, weight.shape[0])
    for start in range(0, x.shape[0], max(rows, 1)):
        part = x[start : start + rows]
        here = torch.mm(part, weight.T, out=logits[: part.shape[0]])
        if not (need_dx or need_dweight):
            loss += cross_entropy.forward(here, labels[start : start + rows], *settings)[0].sum()
            continue
        loss += cross_entropy.forward_in_place(here, labels[start : start + rows], None, *settings).sum()
        if need_dx:
            torch.mm(here, weight, out=dx[start : start + rows])
        if need_dweight:
            add_product(dweight, here.T, part)
    return loss, dx, dweight


def scale_chunks(dloss: Tensor, dx: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dweight times the upstream gradient, both in the dtype of dx; one walk over each."""
    scaled = torch.empty(dx.shape, dtype=dx.dtype, device=dx.device)
    scaled_weight = torch.empty(dweight.shape, dtype=dx.dtype, device=dweight.device)
    # dx as fp32: beside a 16-bit tensor, torch would round the upstream gradient to 16 bits too.
    return torch.mul(dx.float(), dloss, out=scaled), torch.mul(dweight, dloss, out=scaled_weight)
