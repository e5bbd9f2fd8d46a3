"""Timelines for Perfetto (ui.perfetto.dev) and chrome://tracing, in the Trace Event Format's JSON."""

import json
from pathlib import Path
from typing import Any

from .held import HELD
from .simulate import Timeline

NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def write_trace(timeline: Timeline, path: str | Path, unit: float = 1e6) -> None:
    """Writes a track a rank, and counters of what they hold. `unit`: microseconds that a time of 1 stands for."""
    events = trace(timeline, unit)
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


def trace(timeline: Timeline, unit: float = 1e6) -> list[dict[str, Any]]:
    """The events: metadata ("M"), actions ("X", start and duration in microseconds), activations held ("C")."""
    schedule = timeline.schedule
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"{schedule.name}, simulated"}}
    ]
    for rank, program in enumerate(schedule):
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        held = 0
        for action, start, end in zip(program, timeline.starts[rank], timeline.ends[rank], strict=True):
            about = {"micro_batch": action.micro_batch, "chunk": action.chunk}
            about["stage"] = schedule.stage_of(rank, action.chunk)
            common = {"pid": 0, "tid": rank, "ts": start * unit}
            events.append(
                {"ph": "X", **common, "dur": (end - start) * unit, "name": str(action), "cat": NAMES[action.kind]}
                | {"args": about}
            )
            change = HELD[action.kind]
            if change:
                held += change
                at = (start if change > 0 else end) * unit
                events.append(
                    {"ph": "C", "pid": 0, "ts": at, "name": f"in flight, rank {rank}", "args": {"activations": held}}
                )
    return events
