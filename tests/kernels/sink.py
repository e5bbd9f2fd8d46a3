"""A gradient sink as a training engine has it, that counts."""

from collections.abc import Callable

import torch
from torch import Tensor


class Sink:
    """A buffer, NaN before it is written, with how often it was asked for and how often written.

    Where `postponed` is a list, weight gradients that can be made later are appended to it.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.postponed: list[Callable[[], None]] | None = None
        self.total = torch.full(like.shape, torch.nan, dtype=dtype, device=like.device)
        self.calls = self.done = 0

    def __call__(self) -> tuple[Tensor, bool]:
        self.calls += 1
        return self.total, self.calls > 1

    def written(self) -> None:
        assert not self.total.isnan().any()
        self.done += 1

    def when_due(self, write: Callable[[], None]) -> None:
        if self.postponed is None:
            write()
        else:
            self.postponed.append(write)
