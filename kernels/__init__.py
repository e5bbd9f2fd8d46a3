"""The operations of a transformer, each with the implementations that exist for it, and the choice among them.

    ops = kernels.choose("cpu", {"rms_norm": "reference"})
    y = ops.rms_norm(x, weight, eps=1e-6)

`kernels.cost` (FLOPs and bytes) needs no torch. Everything else is loaded on first use: importing this package costs
nothing, and nothing is compiled, registered or initialised by it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .registry import Kernels, KernelUnavailable, Row, choose, serves, table

__all__ = ["KernelUnavailable", "Kernels", "Row", "choose", "serves", "table"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".registry", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
