"""How parameters lie in flat buffers: where each starts, and where a bucket ends (see megapre.parallel.data)."""

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64
"""Elements that each parameter starts at a multiple of: 128 bytes in bf16, the widest vector or sector of any device we
run on."""
BUCKET_ELEMENTS = 25_000_000
"""100 MB of fp32 gradient: long enough to reach full bandwidth, short enough to overlap."""


class Cut(NamedTuple):
    """Where each parameter starts, and the buckets, as [start, stop) and how many parameters they hold."""

    starts: tuple[int, ...]
    buckets: tuple[tuple[int, int, int], ...]

    @property
    def elements(self) -> int:
        """Of the whole buffer."""
        return self.buckets[-1][1] if self.buckets else 0


def lay_out(sizes: Sequence[int], shards: int, bucket_elements: int = BUCKET_ELEMENTS) -> Cut:
    """Parameters of `sizes` elements one after the other. A bucket is closed as soon as it has `bucket_elements`, and
    is a multiple of ALIGNMENT * shards, so that each of `shards` ranks has an equal part.
    """
    unit = ALIGNMENT * shards
    starts: list[int] = []
    buckets: list[tuple[int, int, int]] = []
    end = begun = held = 0
    for number, size in enumerate(sizes, 1):
        starts.append(end)
        stop, held = end + size, held + 1
        end = -(-stop // ALIGNMENT) * ALIGNMENT
        if end - begun >= bucket_elements or number == len(sizes):
            end = begun + -(-(stop - begun) // unit) * unit
            buckets.append((begun, end, held))
            begun, held = end, 0
    return Cut(tuple(starts), tuple(buckets))
