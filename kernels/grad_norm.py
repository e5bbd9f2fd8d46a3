"""Euclidean norm of all gradients together, the same bits on every run and for every number of threads.

    norm = sqrt(sum over tensors and elements of g^2)

Shapes   any number of tensors of any shape and floating dtype; the result is a 0-dim fp32 tensor on their device.
Cost     2 FLOPs an element; reads every gradient once and writes nothing.
Floor    memory: bytes / read rate.

Each tensor is cut into blocks of fixed size, each block is reduced by itself and the few block norms are added in fp64
in order: no atomics, and no dependence on how many threads or SMs share the work. Short blocks also keep the rounding
of long fp32 sums away: a buffer of 1e8 elements is as exact as one of 4,096. inf and NaN pass through to the result,
and gradients above 1e18, whose squares overflow, give inf.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import wide

BLOCK = 4096


def reference(grads: Sequence[Tensor]) -> Tensor:
    """Plain torch, the definition of correct. No host sync. An empty sequence has norm 0."""
    norms = [block for grad in grads for block in _block_norms(grad.detach())]
    if not norms:
        return torch.zeros((), dtype=torch.float32)
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float()


def _block_norms(grad: Tensor) -> list[Tensor]:
    flat = grad.reshape(-1)
    dtype = wide(grad.dtype)
    whole = flat.numel() // BLOCK * BLOCK
    parts = [torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1, dtype=dtype)]
    if flat.numel() > whole:
        parts.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype).reshape(1))
    return parts
