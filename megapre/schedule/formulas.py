"""What the tables come to, in closed form: what the tests hold the tables, and docs the bubbles, against.

Legend: p ranks, v chunks a rank, m micro-batches, r rank, g group of interleaved.
"""

from .actions import ScheduleError
from .interleaved import smallest_group


def bubble(name: str, ranks: int, chunks: int, micro_batches: int) -> float | None:
    """Idle time over the time of the work where F takes 1, I and W 1 each, B 2, and messages nothing. None where the
    micro-batches are too few for a closed form.

    No order has less than (p-1)/(3 v m): the last rank begins p - 1 forwards late.
    """
    p, v, m = ranks, chunks, micro_batches
    enough = {"zbv": 2 * p - 1, "dualpipev": 2 * p, "zb_h1": p}.get(name, p if v > 1 else 1)
    return (p - 1) / (m * v * (3 if name in SPLIT else 1)) if m >= enough else None


SPLIT = ("zb_h1", "zbv", "dualpipev")
"""Schedules that split backwards."""


def in_flight(name: str, ranks: int, chunks: int, micro_batches: int, rank: int, group: int | None = None) -> int:
    """Most activations that `rank` holds, in chunks' worth: v of them are one micro-batch's on that rank.

    Interleaved: on rank 0 with g = p, p(1 + (p-1)/(pv)) micro-batches' worth (Narayanan et al. 2021). Raises
    ScheduleError for an unknown name.
    """
    p, v, m, r = ranks, chunks, micro_batches, rank
    match name:
        case "gpipe" | "breadth_first":
            return m * v
        case "1f1b":
            return min(p - r, m)
        case "interleaved":
            return min(2 * (p - r - 1) + (v - 1) * (group or smallest_group(p, m)) + 1, m * v)
        case "zb_h1":
            return min(p, m)
        case "zbv":
            return min(2 * p, 2 * m, m + r + 1)
        case "dualpipev":
            return min(2 * p + 1, 2 * m)
    raise ScheduleError(f"schedule: no closed form for {name!r}")
