"""Parameters and gradients as flat buffers.

The optimizer, the gradient norm and (with several ranks) the collectives want few long vectors, the model wants many
small tensors. Both get theirs: every parameter becomes a view into a contiguous buffer, one for the parameters that
decay and one for those that do not, laid out in reverse order of use. That is the order in which gradients appear in
the backward, so that a bucket, a consecutive cut of the buffer, is complete as early as possible. Gaps between
parameters (megapre.plan.flat) hold zeros, whose gradient is zero and whose AdamW update is therefore zero.

    dtype of the model   param buffer   master                     grad
    bf16                 bf16           fp32, own                  fp32: micro-batches are added up in fp32; or bf16
    bf16, no master      bf16           the param buffer itself    fp32 or bf16
    fp16                 fp16           fp32, own                  fp32
    fp32                 fp32           the param buffer itself    fp32

A bf16 sum is rounded after every addition, by 2^-9 of itself at most: after k of them a gradient is off by at most
k 2^-9 of the largest sum on the way, mostly by sqrt(k) of that. A micro-batch is one addition, but for the head's
matrix every chunk of logits is one, and where head and embedding are tied the embedding another.

A gradient arrives on one of two ways. An op that can adds it up in the buffer itself: the parameter's `gradient_sink`
(kernels/gradient_sink.py) hands it the place. From every other op it comes through a post-accumulate hook, which takes
over the tensor that autograd made and drops it at once. Either way the first gradient of a step overwrites the old
contents and later ones are added; nothing is zeroed beforehand and no full set of low-precision gradients ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megapre.plan.buffers import OWN
from megapre.plan.flat import BUCKET_ELEMENTS, lay_out

from .comm import Group
from .exchange import Exchange, sum_together


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives in its group's buffers: elements [start, stop), viewed as `shape`."""

    name: str
    shape: torch.Size
    start: int
    stop: int

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop].view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """A consecutive cut [start, stop) of a group's buffers, made of whole parameters."""

    start: int
    stop: int
    names: tuple[str, ...]


class Share(NamedTuple):
    """What other ranks of one replica of the model know of a parameter.

    ranks: those that hold it too (or `rows` of it, ranges of its first dimension), each with a part of its gradient,
    so that the sum of theirs is the gradient; None: nobody, or everybody has the whole gradient. counted: whether this
    rank, of all that hold it, counts it in the norm. holders: who these are, one of megapre.plan.buffers.
    """

    ranks: Group | None = None
    counted: bool = True
    rows: tuple[tuple[int, int], ...] = ()
    holders: int = OWN


class Piece(NamedTuple):
    """Part of a group's buffers that this rank updates, from element `start` on, all of one length.

    `kept`: its place in what the rank keeps, such as moments.
    """

    start: int
    kept: slice
    param: Tensor
    master: Tensor
    grad: Tensor


class FlatGroup:
    """The parameters that share a weight decay setting and a Share, and their buffers.

    param and grad are whole. Of the rest a rank keeps its share alone: where the states are sharded over `shards`, that
    is an equal part of each bucket, one after the other, `kept` elements in all.
    """

    def __init__(
        self,
        decays: bool,
        share: Share,
        parameters: list[tuple[str, nn.Parameter]],
        bucket_elements: int,
        keep_master: bool,
        grad_dtype: torch.dtype,
        shards: Group,
    ) -> None:
        self.decays, self.share, self.shards = decays, share, shards
        self.number = 2 * share.holders + decays  # the same on all ranks that hold these parameters
        cut = lay_out([parameter.numel() for _, parameter in parameters], shards.size, bucket_elements)
        self.slots = {
            name: Slot(name, parameter.shape, start, start + parameter.numel())
            for (name, parameter), start in zip(parameters, cut.starts, strict=True)
        }
        names = iter(self.slots)
        self.buckets = [Bucket(start, stop, tuple(islice(names, held))) for start, stop, held in cut.buckets]
        end = cut.elements
        dtypes = {parameter.dtype for _, parameter in parameters}
        devices = {parameter.device for _, parameter in parameters}
        if len(dtypes) != 1 or len(devices) != 1:
            raise ValueError(f"parameters of one group must share dtype and device, got {dtypes} on {devices}")
        self.param = torch.zeros(end, dtype=dtypes.pop(), device=devices.pop())
        for name, parameter in parameters:
            view = self.slots[name].view(self.param)
            view.copy_(parameter.detach())
            parameter.data = view
        self.grad = torch.zeros(end, dtype=grad_dtype, device=self.param.device)
        self.kept = end // shards.size
        alone = self.param.dtype == torch.float32 or not keep_master
        self.master = self.param if alone else torch.empty(self.kept, device=self.param.device)
        if not alone:
            for piece in self.pieces():
                piece.master.copy_(piece.param)

    def own(self, bucket: Bucket) -> slice:
        """The elements of `bucket` that this rank updates."""
        length = (bucket.stop - bucket.start) // self.shards.size
        start = bucket.start + self.shards.index * length
        return slice(start, start + length)

    def pieces(self) -> Iterator[Piece]:
        """What this rank updates: all of the buffers at once where nothing is sharded."""
        whole = [(slice(0, self.kept), slice(0, self.kept))]
        cut = [
            (self.own(bucket), slice(bucket.start // self.shards.size, bucket.stop // self.shards.size))
            for bucket in self.buckets
        ]
        for own, kept in whole if self.shards.size == 1 else cut:
            param = self.param[own]
            master = param if self.master is self.param else self.master[kept]
            yield Piece(own.start, kept, param, master, self.grad[own])

    def counted(self) -> list[Tensor]:
        """The gradients of which this rank tells the norm: its own, but for those that another rank counts."""
        if not self.share.counted and not self.share.rows:
            return []
        owned = [slice(0, self.kept)] if self.shards.size == 1 else [self.own(bucket) for bucket in self.buckets]
        skipped = [rows for slot in self.slots.values() for rows in self._told_elsewhere(slot)]
        return [
            self.grad[start:stop] for own in owned for start, stop in _without(own.start, own.stop, sorted(skipped))
        ]

    def written(self, slot: Slot) -> list[tuple[int, int]]:
        """Ranges of the buffers with the elements of parameter `slot` that no other rank of this replica writes."""
        if not self.share.counted and not self.share.rows:
            return []
        return list(_without(slot.start, slot.stop, self._told_elsewhere(slot)))

    def _told_elsewhere(self, slot: Slot) -> list[tuple[int, int]]:
        if self.share.counted:
            return []
        row = (slot.stop - slot.start) // slot.shape[0]
        return [(slot.start + first * row, slot.start + last * row) for first, last in self.share.rows]

    def states(self, slot: Slot, buffer: Tensor) -> list[tuple[slice, Tensor]]:
        """What this rank keeps for the parameter `slot` in `buffer`, of `kept` elements: which elements of the group's
        buffers it belongs to, and views of it.
        """
        found = []
        for piece in self.pieces():
            start, stop = max(slot.start, piece.start), min(slot.stop, piece.start + len(piece.param))
            if start < stop:
                at = piece.kept.start + start - piece.start
                found.append((slice(start, stop), buffer[at : at + stop - start]))
        return found

    def shared(self) -> list[Tensor]:
        """Views of the gradients that are to be summed over `share.ranks`."""
        if self.share.ranks is None:
            return []
        if not self.share.rows:
            return [self.grad]
        views = [slot.view(self.grad) for slot in self.slots.values()]
        return [view[first:last] for view in views for first, last in self.share.rows]


def _without(start: int, stop: int, skipped: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """[start, stop) less the ranges `skipped`, which are in order and do not overlap."""
    for first, last in skipped:
        if start < min(first, stop):
            yield start, min(first, stop)
        start = max(start, min(last, stop))
    if start < stop:
        yield start, stop


def _taking_into(sink: _Sink) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        if parameter.grad is None:  # autograd calls the hook also where an op has written into the sink itself
            return
        total, add = sink()
        if add:
            total.add_(parameter.grad)
        else:
            total.copy_(parameter.grad)
        parameter.grad = None
        sink.written()

    return take


class _Sink:
    """The gradient sink of one parameter (kernels/gradient_sink.py)."""

    def __init__(self, owner: FlatParameters, name: str, total: Tensor) -> None:
        self.owner, self.name, self.total = owner, name, total

    def __call__(self) -> tuple[Tensor, bool]:
        first = self.name in self.owner.missing
        self.owner.missing.discard(self.name)
        return self.total, not first

    def written(self) -> None:
        if self.owner.exchange is not None:
            self.owner.exchange.arrived(self.name)

    def when_due(self, write: Callable[[], None]) -> None:
        if self.owner.postponed is None:
            write()
        else:
            self.owner.postponed.append(write)


ALONE = Group((0,), 0)
NOT_SHARED = Share()


class FlatParameters:
    """Takes over a model's parameters: after this they are views, and gradients land in `groups[i].grad`.

    `parameters` come in order of use (the order of `model.named_parameters()`), tied parameters once. Those with equal
    `decays(name, parameter)` and `share(name)` are one group. `replicas` hold the same parameters: their gradients are
    summed and, with `sharded`, each keeps and updates a part of the optimizer's states (ZeRO-1, Rajbhandari et al.
    2020, arXiv:1910.02054).
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        decays: Callable[[str, Tensor], bool],
        bucket_elements: int = BUCKET_ELEMENTS,
        keep_master: bool = True,
        grad_dtype: torch.dtype = torch.float32,
        share: Callable[[str], Share] = lambda name: NOT_SHARED,
        replicas: Group = ALONE,
        sharded: bool = True,
    ) -> None:
        reverse = list(parameters)[::-1]
        members: dict[tuple[bool, Share], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in reverse:
            members.setdefault((decays(name, parameter), share(name)), []).append((name, parameter))
        shards = replicas if sharded else ALONE
        self.counts = sharded or replicas.index == 0
        self.groups = tuple(
            FlatGroup(side, known, found, bucket_elements, keep_master, grad_dtype, shards)
            for (side, known), found in sorted(members.items(), key=lambda item: not item[0][0])
        )
        self.missing: set[str] = set()
        self.postponed: list[Callable[[], None]] | None = None
        """Where weight gradients go that an op can make later, as calls; None: they are made at once."""
        self.exchange = Exchange(self.groups, [name for name, _ in reverse], replicas) if replicas.size > 1 else None
        by_name = dict(reverse)
        for group in self.groups:
            for name, slot in group.slots.items():
                sink = _Sink(self, name, slot.view(group.grad))
                by_name[name].gradient_sink = sink  # type: ignore[attr-defined]
                by_name[name].register_post_accumulate_grad_hook(_taking_into(sink))

    def begin_step(self) -> None:
        """From here the first gradient of each parameter replaces what the last step left."""
        self.missing = {name for group in self.groups for name in group.slots}

    def finish_step(self) -> None:
        """After this every gradient that this rank updates with is the whole one: zero where a parameter took no part
        in this step, summed over the ranks that share it and over all replicas.
        """
        for group in self.groups:
            for name in self.missing & group.slots.keys():
                group.slots[name].view(group.grad).zero_()
            if shared := group.shared():
                assert group.share.ranks is not None
                sum_together(shared, group.share.ranks)
        self.missing = set()
        if self.exchange is not None:
            self.exchange.finish()

    def counted(self) -> list[Tensor]:
        """The gradients whose squares, summed over all ranks, are the square of the norm."""
        return [part for group in self.groups for part in group.counted()] if self.counts else []

    def named(self, buffer: Callable[[FlatGroup], Tensor]) -> dict[str, Tensor]:
        """Views by parameter name of the whole buffer that `buffer` picks, such as `lambda group: group.grad`."""
        return {name: slot.view(buffer(group)) for group in self.groups for name, slot in group.slots.items()}
