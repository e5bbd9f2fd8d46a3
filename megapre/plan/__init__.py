"""Arithmetic about a run, before it runs: parameters, FLOPs, memory, peaks of hardware, and the box that shows them.

No torch: everything here is worked out from the config alone, for any layout, on any machine.
"""

from .box import render
from .flops import per_token
from .hardware import Device, find
from .link import Link
from .memory import Memory, fullest_rank
from .params import Parameters, count
from .prediction import Plan, predict

__all__ = [
    "Device",
    "Link",
    "Memory",
    "Parameters",
    "Plan",
    "count",
    "find",
    "fullest_rank",
    "per_token",
    "predict",
    "render",
]
