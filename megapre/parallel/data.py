"""Parameters and gradients as flat buffers.

The optimizer, the gradient norm and (with several ranks) the collectives want few long vectors, the model wants many
small tensors. Both get theirs: every parameter becomes a view into a contiguous buffer, one for the parameters that
decay and one for those that do not, laid out in reverse order of use. That is the order in which gradients appear in
the backward, so that a bucket, a consecutive cut of the buffer, is complete as early as possible.

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

import torch
from torch import Tensor, nn

# Each parameter starts at a multiple of 64 elements: 128 bytes in bf16, the widest vector or sector of any device we
# run on. The gap holds zeros, whose gradient is zero and whose AdamW update is therefore zero.
ALIGNMENT = 64
# 25M elements are 100 MB of fp32 gradient: long enough to reach full bandwidth, short enough to overlap.
BUCKET_ELEMENTS = 25_000_000


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


class FlatGroup:
    """The parameters that share a weight decay setting, and their buffers (1-D, equal length)."""

    def __init__(
        self,
        decays: bool,
        parameters: list[tuple[str, nn.Parameter]],
        bucket_elements: int,
        keep_master: bool,
        grad_dtype: torch.dtype,
    ) -> None:
        self.decays = decays
        self.slots: dict[str, Slot] = {}
        end = 0
        for name, parameter in parameters:
            start, stop = end, end + parameter.numel()
            self.slots[name] = Slot(name, parameter.shape, start, stop)
            end = -(-stop // ALIGNMENT) * ALIGNMENT
        dtypes = {parameter.dtype for _, parameter in parameters}
        devices = {parameter.device for _, parameter in parameters}
        if len(dtypes) != 1 or len(devices) != 1:
            raise ValueError(f"parameters of one group must share dtype and device, got {dtypes} on {devices}")
        self.param = torch.zeros(end, dtype=dtypes.pop(), device=devices.pop())
        for name, parameter in parameters:
            view = self.slots[name].view(self.param)
            view.copy_(parameter.detach())
            parameter.data = view
        alone = self.param.dtype == torch.float32 or not keep_master
        self.master = self.param if alone else self.param.to(torch.float32)
        self.grad = torch.zeros(end, dtype=grad_dtype, device=self.param.device)
        self.buckets = tuple(self._cut(bucket_elements))

    def _cut(self, bucket_elements: int) -> Iterator[Bucket]:
        start, names = 0, []
        slots = list(self.slots.values())
        for slot, following in zip(slots, [*slots[1:], None], strict=True):
            names.append(slot.name)
            stop = following.start if following else self.param.numel()
            if stop - start >= bucket_elements or following is None:
                yield Bucket(start, stop, tuple(names))
                start, names = stop, []


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

    return take


class _Sink:
    """The gradient sink of one parameter (kernels/gradient_sink.py)."""

    def __init__(self, owner: FlatParameters, name: str, total: Tensor) -> None:
        self.owner, self.name, self.total = owner, name, total

    def __call__(self) -> tuple[Tensor, bool]:
        first = self.name in self.owner._missing
        self.owner._missing.discard(self.name)
        return self.total, not first

    def when_due(self, write: Callable[[], None]) -> None:
        if self.owner.postponed is None:
            write()
        else:
            self.owner.postponed.append(write)


class FlatParameters:
    """Takes over a model's parameters: after this they are views, and gradients land in `groups[i].grad`.

    `parameters` come in order of use (the order of `model.named_parameters()`), tied parameters once. `decays(name,
    parameter)` puts each in one of at most two groups.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        decays: Callable[[str, Tensor], bool],
        bucket_elements: int = BUCKET_ELEMENTS,
        keep_master: bool = True,
        grad_dtype: torch.dtype = torch.float32,
    ) -> None:
        reverse = list(parameters)[::-1]
        sides = ([p for p in reverse if decays(*p)], [p for p in reverse if not decays(*p)])
        self.groups = tuple(
            FlatGroup(side_decays, side, bucket_elements, keep_master, grad_dtype)
            for side_decays, side in zip((True, False), sides, strict=True)
            if side
        )
        self._missing: set[str] = set()
        self.postponed: list[Callable[[], None]] | None = None
        """Where weight gradients go that an op can make later, as calls; None: they are made at once."""
        for group in self.groups:
            for name, parameter in reverse:
                if slot := group.slots.get(name):
                    sink = _Sink(self, name, slot.view(group.grad))
                    parameter.gradient_sink = sink  # type: ignore[attr-defined]
                    parameter.register_post_accumulate_grad_hook(_taking_into(sink))

    def begin_step(self) -> None:
        """From here the first gradient of each parameter replaces what the last step left."""
        self._missing = {name for group in self.groups for name in group.slots}

    def finish_step(self) -> None:
        """Zeroes the gradient of every parameter that took no part in this step."""
        for group in self.groups:
            for name in self._missing & group.slots.keys():
                group.slots[name].view(group.grad).zero_()
        self._missing = set()

    def named(self, buffer: Callable[[FlatGroup], Tensor]) -> dict[str, Tensor]:
        """Views by parameter name of the buffer that `buffer` picks, such as `lambda group: group.master`."""
        return {name: slot.view(buffer(group)) for group in self.groups for name, slot in group.slots.items()}
