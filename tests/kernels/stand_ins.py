"""What tests of other libraries' rows share; the fixtures `stand_in` and `nothing_real` are in conftest.py."""

from typing import Any

import torch
from torch import Tensor

Calls = list[dict[str, Any]]
"""What a stand-in was called with."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
