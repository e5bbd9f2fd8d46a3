"""The calls of a provider that are timed, one a mode, and what they compute.

Inputs lie still: every call reads and, in place, writes the same tensors, so that it can be captured in a CUDA graph.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .timer import Work


class Buffer:
    """A gradient sink: its owner's fp32 place, which each backward overwrites. NaN until then."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.full_like(like, torch.nan, dtype=torch.float32, requires_grad=False)

    def __call__(self) -> tuple[Tensor, bool]:
        return self.total, False

    def written(self) -> None:
        pass

    def when_due(self, write: Callable[[], None]) -> None:
        write()


def prepared(case: Case, function: Callable[..., Any], modes: Collection[str]) -> tuple[dict[str, Work], list[Tensor]]:
    """One call a mode of a provider, and what it computes: outputs, and gradients where a mode takes them."""
    if not case.leaves:
        if case.prepare is not None:
            case.prepare()
        return {"step": function}, [t.detach().clone() for t in function()]
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
    buffer = None if case.sunk is None else Buffer(leaves[case.sunk])
    if case.sunk is not None:
        leaves[case.sunk].gradient_sink = buffer  # type: ignore[attr-defined]

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    if set(modes) == {"forward"}:
        with torch.no_grad():
            return {"forward": forward}, tensors(function(*leaves))
    outputs = tensors(function(*leaves))
    upstream = [given.to(out.dtype) for given, out in zip(case.upstream, outputs, strict=True)]

    def gradients(outputs: list[Tensor], keep: bool) -> list[Tensor | None]:
        sinking = buffer is not None
        return list(torch.autograd.grad(outputs, leaves, upstream, retain_graph=keep, allow_unused=sinking))

    def full() -> None:
        gradients(tensors(function(*leaves)), False)

    works: dict[str, Work] = {"forward": forward, "full": full}
    keep = "backward" in modes
    grads = gradients(outputs, keep)
    results = [out.detach() for out in outputs]
    results += [buffer.total if grad is None and buffer is not None else grad for grad in grads]  # type: ignore[misc]
    if keep:
        works["backward"] = lambda: gradients(outputs, True)
    return works, results


def tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
