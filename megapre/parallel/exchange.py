"""What replicas of a model tell each other: gradients as they come, and parameters after the update.

A bucket's gradients are summed over the replicas as soon as the last of them is written, while the backward goes on
with the layers before. How often a gradient is written in a step (once a micro-batch, twice where a parameter is used
twice) the first step tells; it communicates at its end. Buckets start in one order on every rank, that in which the
backward completes them: one that is ready early waits for those before it, so that no two ranks wait for each other.

With sharded states a sum goes to the rank that updates it (reduce-scatter), and what is updated comes back (all-gather)
while the next forward runs: `ready` waits for the parameters of a layer, and is called before the layer reads them.
Otherwise every rank gets every sum (all-reduce) and updates everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import all_gather, reduce_scatter

if TYPE_CHECKING:
    from .comm import Group
    from .data import Bucket, FlatGroup


class _Part(NamedTuple):
    """A bucket with the group whose it is."""

    group: FlatGroup
    bucket: Bucket


class Exchange:
    """Between `replicas`, of the buckets of `groups`. `names`: all parameters in the order in which the backward
    completes them.
    """

    def __init__(self, groups: Sequence[FlatGroup], names: Sequence[str], replicas: Group) -> None:
        self.replicas = replicas
        last = {name: number for number, name in enumerate(names)}
        parts = [_Part(group, bucket) for group in groups for bucket in group.buckets]
        # What is first summed within the replica, after the backward, comes last: it would hold up the rest.
        self.parts = sorted(
            parts, key=lambda p: (p.group.share.ranks is not None, max(last[n] for n in p.bucket.names))
        )
        self.part_of = {name: number for number, part in enumerate(self.parts) for name in part.bucket.names}
        self.arrivals: Counter[str] = Counter()
        self.expected: Counter[str] = Counter()
        """Of each parameter in a step; empty before the first."""
        self.waiting = [0] * len(self.parts)
        self.begun = 0
        self.sums: list[dist.Work] = []
        self.gathers: dict[int, dist.Work] = {}
        self._await_all()

    def _await_all(self) -> None:
        """A new step: nothing is written yet. A bucket that the backward cannot complete waits for one name more."""
        self.arrivals.clear()
        self.begun = 0
        for number, (group, bucket) in enumerate(self.parts):
            late = not self.expected or group.share.ranks is not None
            self.waiting[number] = late + sum(self.expected[name] > 0 for name in bucket.names)

    def arrived(self, name: str) -> None:
        """Another gradient of `name` is written. Raises RuntimeError where its sum has begun already."""
        if self.part_of[name] < self.begun:
            raise RuntimeError(
                f"the gradient of {name} was written {self.arrivals[name] + 1} times in this step and "
                f"{self.expected[name]} times in the first: replicas have summed it too early. A step must use each "
                f"parameter as often as the first did"
            )
        self.arrivals[name] += 1
        if self.arrivals[name] == self.expected[name]:
            number = self.part_of[name]
            self.waiting[number] -= 1
            while self.begun < len(self.parts) and self.waiting[self.begun] == 0:
                self._sum(self.parts[self.begun])
                self.begun += 1

    def finish(self) -> None:
        """Begins all sums that have not begun, and waits for all. Afterwards own parts of gradients are whole sums."""
        for part in self.parts[self.begun :]:
            self._sum(part)
        for work in self.sums:
            work.wait()
        self.sums.clear()
        if not self.expected:
            self.expected = Counter(self.arrivals)
        self._await_all()

    def _sum(self, part: _Part) -> None:
        group, bucket = part
        grads = group.grad[bucket.start : bucket.stop]
        if group.shards.size == 1:
            self.sums.append(dist.all_reduce(grads, group=self.replicas.handle, async_op=True))
        else:
            own = group.grad[group.own(bucket)]
            self.sums.append(reduce_scatter(own, grads, group=self.replicas.handle, async_op=True))

    def gather(self) -> None:
        """After the update: begins to hand round the parameters that each rank has updated, first used first."""
        for number in reversed(range(len(self.parts))):
            group, bucket = self.parts[number]
            if group.shards.size > 1:
                whole = group.param[bucket.start : bucket.stop]
                own = group.param[group.own(bucket)]
                self.gathers[number] = all_gather(whole, own, group=self.replicas.handle, async_op=True)

    def ready(self, prefix: str = "") -> None:
        """Waits for the parameters whose names begin so; all without one."""
        if not self.gathers:
            return
        for number in list(self.gathers):
            if any(name.startswith(prefix) for name in self.parts[number].bucket.names):
                self.gathers.pop(number).wait()


def sum_together(tensors: Sequence[Tensor], ranks: Group) -> None:
    """Sums each tensor over `ranks`, in place, in one collective."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0], group=ranks.handle)
        return
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed, group=ranks.handle)
    for tensor, total in zip(tensors, packed.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
