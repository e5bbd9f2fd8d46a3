"""In what precision an operation computes: fp32 for all 16 and 32-bit inputs, fp64 for fp64 (so gradcheck works)."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a reference computes and accumulates for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
