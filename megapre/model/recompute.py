"""What a model computes again in its backward instead of keeping it.

    norm         outputs of norms, from the stream and the statistics that the norm's own backward keeps anyway
    activation   outputs of gelu, swiglu and geglu, from their inputs, kept anyway
    block        everything within a block (or several in a row), from the stream that entered it
                 (Chen et al. 2016, arXiv:1604.06174)

The first two cost one pass over memory each, under a hundredth of a step; a block costs its forward. What is computed
again is bit for bit what was there: the same kernels on the same input, and random numbers, if there were any, from the
same state of the generator. Gradients are the same bits too, but for 16-bit blocks: where a group of them begins, the
two parts of the stream's gradient are rounded before they are added, and not only after.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recompute(NamedTuple):
    """norm, activation: in blocks that are not recomputed whole. blocks: so many, from the first of a piece, are, in
    groups of `group` in a row that keep one input together.
    """

    norm: bool = False
    activation: bool = False
    blocks: int = 0
    group: int = 1


def forgetting(value: Tensor, again: Callable[[], Tensor] | None) -> AbstractContextManager[object]:
    """Operations in this context keep `again` for their backward wherever they would keep `value`.

    Keeps everything where `again` is None, and inside torch.compile, which decides by itself what to keep.
    """
    if again is None or torch.compiler.is_compiling():
        return nullcontext()
    place, shape = value.data_ptr(), value.shape

    def pack(kept: Tensor) -> Tensor | None:
        return None if kept.data_ptr() == place and kept.shape == shape else kept

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return again()

    return saved_tensors_hooks(pack, unpack)
