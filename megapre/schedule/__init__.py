"""Pipeline schedules as data: what each rank does, in order. Pure Python.

A schedule is built from a name or read from a file, checked, simulated, drawn and executed, all from the same table. At
one rank it is gradient accumulation.
"""

from .actions import Action, Placement, Schedule, ScheduleError, holder, stage_of
from .build import BUILDERS, build
from .check import check, checked
from .files import read, write
from .held import peak_in_flight
from .named import named, placement_of
from .simulate import Costs, Timeline, simulate

__all__ = [
    "BUILDERS",
    "Action",
    "Costs",
    "Placement",
    "Schedule",
    "ScheduleError",
    "Timeline",
    "build",
    "check",
    "checked",
    "holder",
    "named",
    "peak_in_flight",
    "placement_of",
    "read",
    "simulate",
    "stage_of",
    "write",
]
