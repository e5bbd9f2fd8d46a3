"""Runs every implementation of every op once on small, ragged CUDA tensors, forward and backward.

Made for `compute-sanitizer`, which is too slow for real sizes and needs none: an access out of bounds at the ragged end
of a tensor shows at any size. Prints one line an implementation; exit status 1 when a result is not finite.

    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/gpu_small_shapes.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megapre import kernels

DTYPE = torch.bfloat16


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE).requires_grad_()


def backward(*outputs: Tensor) -> None:
    sum(output.float().square().sum() for output in outputs).backward()  # type: ignore[union-attr]


def norm(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    for rows, width in ((1, 8), (37, 1000), (5, 4097)):
        x, residual, weight = leaf(rows, width), leaf(rows, width), leaf(width)
        backward(op(x, weight))
        y, h = op(x, weight, residual=residual)
        backward(y, h)
        yield from (x.grad, residual.grad, weight.grad)


def rope(op: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    cos, sin = torch.rand(2, 64, 32, device="cuda").unbind(0)
    for interleaved in (False, True):
        q, k = leaf(2, 33, 6, 64), leaf(2, 33, 2, 64)
        backward(*op(q, k, cos, sin, interleaved=interleaved))
        yield from (q.grad, k.grad)


def activation(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    for rows, width in ((1, 2), (37, 1026)):
        x = leaf(rows, width)
        backward(op(x))
        yield x.grad


def labels(rows: int, vocab: int) -> Tensor:
    drawn = torch.randint(vocab, (rows,), device="cuda")
    drawn[rows // 2] = -100
    return drawn


def cross_entropy(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    for rows, vocab, padded in ((1, 3, 3), (37, 1000, 1024), (5, 50257, 50304)):
        logits = leaf(rows, padded)
        op(logits, labels(rows, vocab), vocab=vocab, label_smoothing=0.1, z_loss=1e-4).sum().backward()
        yield logits.grad


def linear_cross_entropy(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    x, weight = leaf(130, 64), leaf(1024, 64)
    op(x, weight, labels(130, 1000), vocab=1000).backward()
    yield from (x.grad, weight.grad)


def attention(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    documents = torch.tensor([0, 5, 77, 150, 260], dtype=torch.int32, device="cuda")
    for arguments in ({}, {"cu_seqlens": documents}, {"window": 17}):
        q, k, v = leaf(2, 130, 4, 64), leaf(2, 130, 2, 64), leaf(2, 130, 2, 64)
        backward(op(q, k, v, **arguments))
        yield from (q.grad, k.grad, v.grad)


def adamw(op: Callable[..., None]) -> Iterator[Tensor]:
    size = 100_003
    master, grad = torch.randn(2, size, device="cuda").unbind(0)
    state = [torch.zeros(size, device="cuda") for _ in range(2)]
    scalar = [torch.tensor(value, device="cuda") for value in (1e-3, 1.0, 0.5)]
    param = master.to(DTYPE)
    op(param, master.clone(), *state, grad, lr=scalar[0], step=scalar[1], grad_scale=scalar[2],
       beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)  # fmt: skip
    yield param


def grad_norm(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    yield op([torch.randn(100_003, device="cuda"), torch.randn(7, device="cuda")])


CASES: dict[str, Callable[..., Iterator[Tensor]]] = {
    "layer_norm": norm,
    "rms_norm": norm,
    "rope": rope,
    "gelu": activation,
    "swiglu": activation,
    "geglu": activation,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "attention": attention,
    "adamw_": adamw,
    "grad_norm": grad_norm,
}


def main() -> int:
    failed = False
    for row in kernels.table("cuda"):
        if not row.available:
            continue
        op = getattr(kernels.choose("cuda", {row.op: row.implementation}), row.op)
        results = list(CASES[row.op](op))
        torch.cuda.synchronize()
        finite = all(bool(result.isfinite().all()) for result in results)
        failed |= not finite
        print(f"{row.op:22} {row.implementation:12} {'ok' if finite else 'NOT FINITE'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
