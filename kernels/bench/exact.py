"""What a provider's results should be: the same in a wider dtype, and how far off they are.

16-bit tensors are held against fp32, fp32 and fp64 against fp64. The tolerances tell a wrong result from an inexact
one; how exact each implementation is, the tests say. Peers have a wide one: torch's own layer_norm of 4096 rows in bf16
sums the gradient of the weight in bf16 on a CPU, and is 5% off.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import DTYPES, Case

ENDS = 32  # rows compared of each end where rows are many: an index that overflows shows in the last
TOLERANCE, OF_A_PEER = {2: 2e-2, 4: 2e-3, 8: 2e-3}, 0.25
"""||got - exact|| / ||exact||: of an implementation of ours by the bytes of an element, and of a peer."""


def wider(dtype: str) -> torch.dtype:
    return torch.float32 if DTYPES[dtype].itemsize == 2 else torch.float64


def exact(case: Case) -> list[Tensor]:
    """Of the part that `case.view` takes: outputs, then gradients. Empty where nothing is known."""
    if case.exact is not None:
        return case.exact()
    if case.plain is None or not case.leaves:
        return []
    return through_autograd(case.plain(lambda function: function), case.leaves, case.upstream, wider(case.dtype))


def through_autograd(
    function: Callable[..., Any], leaves: list[Tensor], upstream: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Outputs and gradients of `function` on copies of the leaves in `dtype`."""
    wide = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    outputs = function(*wide)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = torch.autograd.grad(outputs, wide, [given.to(dtype) for given in upstream])
    return [*(out.detach() for out in outputs), *grads]


def ends(rows: Tensor) -> Tensor:
    """The first and the last rows; twice the same where there are few."""
    return torch.cat((rows[:ENDS], rows[-ENDS:]))


def error(case: Case, results: list[Tensor], known: list[Tensor]) -> float:
    """The largest distance of a result from what is known of it; 0 where nothing is."""
    return max((distance(a, b) for a, b in zip(case.view(results), known, strict=False)), default=0.0)


def distance(got: Tensor, known: Tensor) -> float:
    """||got - known|| / ||known||; infinite where shapes differ or got holds NaN, which no maximum may lose."""
    if got.shape != known.shape:
        return math.inf
    wide = known.double()
    found = float((got.double() - wide).norm() / wide.norm().clamp(min=1e-30))
    return math.inf if math.isnan(found) else found
