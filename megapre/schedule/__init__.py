"""Pipeline schedules as data: what each rank does, in order. Pure Python.

A schedule is built from a name, checked, and executed from the same table. At one rank it is gradient accumulation.
"""

from .actions import Action, Schedule, ScheduleError, stage_of
from .build import BUILDERS, build
from .check import check, peak_in_flight

__all__ = ["BUILDERS", "Action", "Schedule", "ScheduleError", "build", "check", "peak_in_flight", "stage_of"]
