"""Where the memory of a run went: by category, predicted beside measured.

weights, gradients, master and moments are the buffers themselves. On CUDA what lies in memory at the end of a last
stage's forward, beside them, are the activations; what the peak adds is logits and workspace; and what torch's
allocator has set aside and never used at that peak is slack. A CPU tells no more than how large the process has been.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import machine
from .metrics import bytes_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from megapre.plan.memory import Memory

    from .step import Engine

STATES = ("weights", "gradients", "master", "moments")
REST, ACTIVATIONS, WORKING, SLACK = "activations, logits, workspace", "activations", "logits, workspace", "slack"


def measured(engine: Engine, before: int) -> dict[str, int]:
    """Bytes by category on this rank, beside `before`, which the process had. All but slack make up the peak."""
    groups, device = engine.flat.groups, engine.device
    found = {
        "weights": _size(group.param for group in groups),
        "gradients": _size(group.grad for group in groups),
        "master": _size(group.master for group in groups if group.master is not group.param),
        "moments": _size((*engine.optimizer.exp_avg, *engine.optimizer.exp_avg_sq)),
    }
    peak, states = machine.peak_memory(device) - before, sum(found.values())
    if device.type != "cuda":
        return {**found, REST: max(peak - states, 0)}
    kept = engine.feed.kept - before
    slack = torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return {**found, ACTIVATIONS: kept - states, WORKING: peak - kept, SLACK: slack}


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def total(found: dict[str, int]) -> int:
    """The peak that the categories make up."""
    return sum(size for name, size in found.items() if name != SLACK)


def comparison(plan: Memory, found: dict[str, int]) -> str:
    """`weights 24.0M 24.0M, ...`: each category as it was predicted and as it was measured."""
    predicted = {
        **{name: getattr(plan, name) for name in STATES},
        ACTIVATIONS: plan.activations,
        WORKING: plan.logits,
        REST: plan.activations + plan.logits,
    }
    told = [
        f"{name} {bytes_text(predicted[name]) if name in predicted else 'none'} {bytes_text(size)}"
        for name, size in found.items()
        if size or predicted.get(name)
    ]
    return f"predicted, measured: {'; '.join(told)}"
