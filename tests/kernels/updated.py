"""What tests of AdamW share: a state in the middle of a run, and what an update is told."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from megapre.kernels import adamw

HYPER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
# On the CPU one vector is 8 to 32 elements, a group of random numbers 128, a thread's share a multiple of 4,096. On
# CUDA a thread has four elements of a group of 128 and the four that are 64 further on; a block has 2,048.
LENGTHS = st.integers(0, 140) | st.sampled_from([255, 256, 257, 1000, 4096, 9001])


def drawn(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scalars(
    lr: float = 1e-2, step: float = 3.0, scale: float | None = None, found: float | None = None
) -> dict[str, Any]:
    made = {"lr": lr, "step": step, "grad_scale": scale, "found_inf": found}
    return {key: None if value is None else torch.tensor(value) for key, value in made.items()}


def state(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Master and moments as they are in the middle of a run."""
    return [drawn(length, 0, dtype), drawn(length, 1, dtype) / 8, drawn(length, 2, dtype).square() / 8]


def told(**given: Any) -> list[Any]:
    """`scalars` and HYPER in the order of the registered ops."""
    return adamw.Update(**scalars(**given), **HYPER).arguments()


def references(tensors: list[Tensor], narrow: torch.dtype, grad: Tensor, **given: Any) -> list[list[Tensor]]:
    """Master and moments after the update in plain torch: held in `narrow`, as an implementation may, and in fp64."""
    results = []
    for dtype in (narrow, torch.float64):
        held = [t.to(dtype, copy=True) for t in tensors]
        adamw.reference(held[0], *held, grad, **scalars(**given), **HYPER)
        results.append(held)
    return results
