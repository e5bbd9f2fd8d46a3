"""Runs every implementation of every op once on small, ragged CUDA tensors, forward and backward.

Made for `compute-sanitizer`, which is too slow for real sizes and needs none: an access out of bounds at the ragged end
of a tensor shows at any size. Prints one line an implementation; exit status 1 when a result is not finite. A call that
an implementation says it does not take is passed over.

    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/gpu_small_shapes.py
    python benchmarks/gpu_small_shapes.py cpu     the implementations of a CPU, to try this file itself
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megapre import kernels
from megapre.kernels.bench.case import IN_PLACE, implementations

DTYPE = torch.bfloat16


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE).requires_grad_()


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
    cos, sin = torch.rand(2, 64, 32).unbind(0)
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
    drawn = torch.randint(vocab, (rows,))
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
    documents = torch.tensor([0, 5, 77, 150, 260], dtype=torch.int32)
    for arguments in ({}, {"cu_seqlens": documents}, {"window": 17}):
        q, k, v = leaf(2, 130, 4, 64), leaf(2, 130, 2, 64), leaf(2, 130, 2, 64)
        backward(op(q, k, v, **arguments))
        yield from (q.grad, k.grad, v.grad)


def adamw(op: Callable[..., None]) -> Iterator[Tensor]:
    size = 100_003
    master, grad = torch.randn(2, size).unbind(0)
    state = [torch.zeros(size) for _ in range(2)]
    scalar = [torch.tensor(value) for value in (1e-3, 1.0, 0.5)]
    param = master.to(DTYPE)
    op(param, master.clone(), *state, grad, lr=scalar[0], step=scalar[1], grad_scale=scalar[2],
       beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)  # fmt: skip
    yield param


def adamw_stochastic(op: Callable[..., None]) -> Iterator[Tensor]:
    size = 100_003
    param, grad = torch.randn(size, dtype=DTYPE), torch.randn(size)
    state = [torch.zeros(size, dtype=DTYPE) for _ in range(2)]
    lr, step = (torch.tensor(value) for value in (1e-3, 1.0))
    op(param, *state, grad, lr=lr, step=step, seed=1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    yield from (param, *state)


def embedding(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    table = leaf(1000, 70)
    backward(op(torch.randint(1000, (3, 37)), table))
    yield table.grad


def linear(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    x, weight, bias = leaf(37, 70), leaf(130, 70), leaf(130)
    backward(op(x, weight, bias))
    yield from (x.grad, weight.grad, bias.grad)


def rope_in_place(op: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Iterator[Tensor]:
    cos, sin = torch.rand(2, 64, 32).unbind(0)
    qkv = leaf(2, 33, 6 + 2 * 2, 64)
    backward(*op(qkv * 1, 6, 2, cos, sin))
    yield qkv.grad


def vocab_parallel_linear_cross_entropy(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    x, weight = leaf(130, 64), leaf(1024, 64)
    op(x, weight, labels(130, 1000), lambda part: part.unsqueeze(0), vocab_start=0, vocab=1000).backward()
    yield from (x.grad, weight.grad)


def grad_norm(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    yield op([torch.randn(100_003), torch.randn(7)])


CASES: dict[str, Callable[..., Iterator[Tensor]]] = {
    "embedding": embedding,
    "linear": linear,
    "layer_norm": norm,
    "rms_norm": norm,
    "rope": rope,
    "rope_": rope_in_place,
    "gelu": activation,
    "swiglu": activation,
    "geglu": activation,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "vocab_parallel_linear_cross_entropy": vocab_parallel_linear_cross_entropy,
    "attention": attention,
    "adamw_": adamw,
    "adamw_stochastic_": adamw_stochastic,
    "grad_norm": grad_norm,
}


def in_place(op: Callable[..., Tensor]) -> Iterator[Tensor]:
    for rows, vocab, padded in ((1, 3, 3), (37, 1000, 1024), (5, 50257, 50304)):
        logits = leaf(rows, padded).detach()
        yield op(logits, labels(rows, vocab), vocab)
        yield logits


def losses_in_place(device: str) -> bool:
    """The cross-entropies that write their gradient over the logits: ops of torch, no rows of the registry."""
    failed = False
    for op in IN_PLACE:
        for row in implementations(op):
            if not row.why_not(device):
                finite = all(bool(result.isfinite().all()) for result in in_place(row.function))
                failed |= not finite
                print(f"{op:35} {row.name:18} {'ok' if finite else 'NOT FINITE'}", flush=True)
    return failed


def main(device: str = "cuda") -> int:
    torch.set_default_device(device)
    kernels.choose(device)  # registers the ops
    failed = losses_in_place(device)
    for row in kernels.table(device):
        if not row.available:
            continue
        op = getattr(kernels.choose(device, {row.op: row.implementation}), row.op)
        results, refused = [], ""
        try:
            results.extend(CASES[row.op](op))
        except ValueError as error:
            if not row.takes:
                raise
            refused = f", then refused: {error}"
        if device == "cuda":
            torch.cuda.synchronize()
        finite = all(bool(result.isfinite().all()) for result in results)
        failed |= not finite
        print(f"{row.op:35} {row.implementation:18} {'ok' if finite else 'NOT FINITE'}{refused}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
