"""Pipeline schedules as data: what each rank does, in order. Pure Python.

A schedule is built from a name or read from a file, checked, simulated, drawn and executed, all from the same table. At
one rank it is gradient accumulation.
"""

from .actions import Action, Schedule, ScheduleError, holder, stage_of
from .build import BUILDERS, build
from .check import check, checked, peak_in_flight
from .files import read, write
from .simulate import Costs, Timeline, simulate

__all__ = [
    "BUILDERS",
    "Action",
    "Costs",
    "Schedule",
    "ScheduleError",
    "Timeline",
    "build",
    "check",
    "checked",
    "holder",
    "peak_in_flight",
    "read",
    "simulate",
    "stage_of",
    "write",
]
