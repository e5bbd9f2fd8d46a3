"""What a collective takes: latency + bytes on the wire / bandwidth (the alpha-beta model), and the fit of both.

    seconds(size) = latency + size * FACTORS[collective](ranks) / bandwidth

`size` is what nccl-tests calls so: the bytes of the largest buffer of a rank. The factor times the size is what a rank
must send at least, so that `bandwidth` is the bus bandwidth, which can be held against that of the hardware whatever
the collective and the number of ranks (nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from ..errors import UserError


def _ring(n: int) -> float:
    return (n - 1) / n


FACTORS: Mapping[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * _ring(n),
    "reduce_scatter": _ring,
    "all_gather": _ring,
    "broadcast": lambda n: 1.0,
    "all_to_all": _ring,
    "send_recv": lambda n: 1.0,
}
"""Bytes on the wire of a rank for each byte of size, by ranks (nccl-tests, doc/PERFORMANCE.md; alltoall.cu)."""

ROUNDS = 50
HUBER = 1.345
"""Deviations, in robust standard deviations, up to which a point counts in full: 95% efficient on normal noise (Huber
1981, "Robust Statistics").
"""


class FitError(UserError):
    """Times that tell no latency and bandwidth."""


class Timed(Protocol):
    """Whatever tells what a collective takes."""

    def seconds(self, collective: str, size: float, ranks: int) -> float:
        """Of one call; 0 among one rank. `size` in bytes, as nccl-tests counts it."""
        ...


@dataclass(frozen=True)
class Link:
    """Seconds, bus bandwidth in bytes/s; `times` are those it was fitted to, seconds by size in bytes, `error` their
    median relative deviation from it, and `worst` the largest.
    """

    latency: float
    bandwidth: float
    error: float = 0.0
    worst: float = 0.0
    times: Mapping[int, float] = field(default_factory=dict)

    def seconds(self, collective: str, size: float, ranks: int) -> float:
        """Of one call, by the fit; 0 among one rank. `size` in bytes, as nccl-tests counts it."""
        return self.latency + size * FACTORS[collective](ranks) / self.bandwidth if ranks > 1 else 0.0

    def interpolated(self, collective: str, size: float, ranks: int) -> float:
        """The same by `times`, which must be of `ranks`: on the line through the next sizes on either side, below the
        smallest as that, beyond the largest from that on at the bandwidth of the fit. Without any, as `seconds`.
        """
        if not self.times:
            return self.seconds(collective, size, ranks)
        sizes = sorted(self.times)
        at = bisect_left(sizes, size)
        if at == 0:
            return self.times[sizes[0]]
        if at == len(sizes):
            return self.times[sizes[-1]] + (size - sizes[-1]) * FACTORS[collective](ranks) / self.bandwidth
        low, high = sizes[at - 1 : at + 1]
        share = (size - low) / (high - low)
        return self.times[low] * (1 - share) + self.times[high] * share


def fit(collective: str, ranks: int, times: Mapping[int, float]) -> Link:
    """The link behind `times`, seconds by size in bytes.

    Deviations are relative to the times, so that small messages tell as much as large ones, and weighed down by Huber's
    weights (iterated) where they are far out: a size at which another algorithm sets in does not bend the line. Raises
    FitError for fewer than three sizes, and for times that do not grow with them.
    """
    if len(times) < 3:
        raise FitError(f"{collective}: {len(times)} sizes give no latency and bandwidth; measure 3 or more")
    factor = FACTORS[collective](ranks)
    wire = [size * factor for size in sorted(times)]
    seconds = [times[size] for size in sorted(times)]
    if min(seconds) <= 0:
        raise FitError(f"{collective}: a time of {min(seconds):g} s is none")
    weights = [1.0] * len(wire)
    latency = slope = 0.0
    for _ in range(ROUNDS):
        before = latency, slope
        latency, slope = _least_squares(wire, seconds, weights)
        off = _deviations(latency, slope, wire, seconds)
        scale = 1.4826 * median(off)  # of the median absolute deviation to the standard deviation, of a normal one
        weights = [1.0 if d <= HUBER * scale else HUBER * scale / d for d in off]
        if math.isclose(before[0], latency, rel_tol=1e-9) and math.isclose(before[1], slope, rel_tol=1e-9):
            break
    if slope <= 0:
        raise FitError(
            f"{collective}: times do not grow with the size, {seconds[0]:.3g} s at {min(times):,} bytes and "
            f"{seconds[-1]:.3g} s at {max(times):,}; measure larger sizes"
        )
    off = _deviations(latency, slope, wire, seconds)
    return Link(latency, 1 / slope, median(off), max(off), dict(times))


def _least_squares(wire: Sequence[float], seconds: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The latency >= 0 and the seconds a byte that minimise the weighted squares of relative deviations."""
    u = [1 / t for t in seconds]
    v = [x / t for x, t in zip(wire, seconds, strict=True)]
    uu = sum(w * a * a for w, a in zip(weights, u, strict=True))
    vv = sum(w * b * b for w, b in zip(weights, v, strict=True))
    uv = sum(w * a * b for w, a, b in zip(weights, u, v, strict=True))
    su = sum(w * a for w, a in zip(weights, u, strict=True))
    sv = sum(w * b for w, b in zip(weights, v, strict=True))
    determinant = uu * vv - uv * uv
    latency = (su * vv - sv * uv) / determinant if determinant > 1e-12 * uu * vv else -1.0
    if latency <= 0:
        return 0.0, sv / vv
    return latency, (sv * uu - su * uv) / determinant


def _deviations(latency: float, slope: float, wire: Sequence[float], seconds: Sequence[float]) -> list[float]:
    return [abs((latency + slope * x) / t - 1) for x, t in zip(wire, seconds, strict=True)]
