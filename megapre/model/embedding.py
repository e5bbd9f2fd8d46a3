"""The table of tokens, or of learned positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from megapre.kernels import Kernels


class Embedding(nn.Embedding):
    """nn.Embedding over the chosen kernel, left uninitialised: `init.initialize` draws every parameter by name."""

    def __init__(self, rows: int, width: int, ops: Kernels, like: dict[str, Any]) -> None:
        super().__init__(rows, width, **like)
        self.ops = ops

    def reset_parameters(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 of any shape, below the number of rows. Returns [..., width]."""
        return self.ops.embedding(ids, self.weight)  # type: ignore[no-any-return]
