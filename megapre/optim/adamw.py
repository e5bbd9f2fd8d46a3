"""AdamW (Loshchilov and Hutter 2019) over the flat buffers of `FlatParameters`, one fused call per group.

Everything that changes from step to step (learning rate, update count, clip factor, whether to skip) is a 0-dim tensor
on the device, so that a step is the same sequence of kernels each time and the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megapre.config import Optim


REGION = 1 << 40
"""Elements that a group of parameters can have, for the numbers of their random bits."""


class Flat(Protocol):
    """Flat buffers that share a weight decay setting; `master` is `param` where that has none. `number` tells a rank's
    groups apart, and is the same on all ranks with copies of a group.
    """

    decays: bool
    number: int
    param: Tensor
    master: Tensor
    kept: int

    def pieces(self) -> Iterable[tuple[int, slice, Tensor, Tensor, Tensor]]:
        """What this rank updates: first element, place in moments of `kept` elements, and param, master, grad."""
        ...


class AdamW:
    """Moments for every group, and the update. `adamw_` is the op of megapre.kernels.

    `updates` (0-dim fp32, on the device) counts updates made. A skipped step does not count, so bias correction stays
    exact. fp32 holds integers to 16.7 million, beyond any run, and 1 - beta**t is 1 long before.

    16-bit parameters that are their own master go to `stochastic_`, the op adamw_stochastic_, with `seed`. Each group
    has a region of element numbers of its own: no two share random bits, and copies of one are rounded alike.
    """

    def __init__(
        self,
        groups: Sequence[Flat],
        optim: Optim,
        adamw_: Callable[..., object],
        stochastic_: Callable[..., object] | None = None,
        seed: int = 0,
    ) -> None:
        self.groups = tuple(groups)
        self.optim = optim
        self.adamw_, self.stochastic_, self.seed = adamw_, stochastic_, seed
        moments = torch.bfloat16 if optim.moments == "bf16" else torch.float32
        device = self.groups[0].param.device
        self.exp_avg = [torch.zeros(group.kept, dtype=moments, device=device) for group in self.groups]
        self.exp_avg_sq = [torch.zeros_like(first) for first in self.exp_avg]
        self.lr = torch.zeros((), device=device)
        self.updates = torch.zeros((), device=device)

    def step(self, lr: float | None, grad_scale: Tensor | None, found_inf: Tensor) -> None:
        """One update with the gradients in the flat buffers, times `grad_scale`; none at all where `found_inf` is 1.

        At the rate `lr`, or at that which `self.lr` holds.
        """
        if lr is not None:
            self.lr.fill_(lr)
        self.updates.add_(1.0 - found_inf)
        for group, exp_avg, exp_avg_sq in zip(self.groups, self.exp_avg, self.exp_avg_sq, strict=True):
            for start, kept, param, master, grad in group.pieces():
                update = partial(self.adamw_, param, master)
                if master.dtype == torch.bfloat16:
                    assert self.stochastic_ is not None, "bf16 weights alone need the op that rounds at random"
                    update = partial(self.stochastic_, param, seed=self.seed, offset=REGION * group.number + start)
                update(
                    exp_avg[kept],
                    exp_avg_sq[kept],
                    grad,
                    lr=self.lr,
                    step=self.updates,
                    beta1=self.optim.beta1,
                    beta2=self.optim.beta2,
                    eps=self.optim.eps,
                    weight_decay=self.optim.weight_decay if group.decays else 0.0,
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                )
