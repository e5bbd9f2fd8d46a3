"""A model's weights under their true vocabulary, the form in which they leave and enter.

Padding the vocabulary is a matter of speed on one machine; checkpoints and exports know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megapre.model.errors import ModelError

if TYPE_CHECKING:
    from megapre.config import Model
    from megapre.model.transformer import Transformer

VOCABULARY_TABLES = ("embed.weight", "head.weight")


def true_rows(name: str, value: Tensor, cfg: Model) -> Tensor:
    """`value` of parameter `name` (or its gradient or moment) without padded vocabulary rows: a view, [:V] or all."""
    return value[: cfg.vocab] if name in VOCABULARY_TABLES else value


def export_state(model: Transformer) -> dict[str, Tensor]:
    """Every parameter by name, detached, true rows only; views of the live weights."""
    return {name: true_rows(name, param.detach(), model.cfg) for name, param in model.named_parameters()}


def load_state(model: Transformer, state: Mapping[str, Tensor]) -> None:
    """Copy `state`, as export_state gives it, into the model, rounding to its dtype; padded rows become zero.

    Raises ModelError, before anything is written, if names or shapes are not exactly the model's.
    """
    target = export_state(model)
    problems = [f"missing: {name} {tuple(value.shape)}" for name, value in target.items() if name not in state]
    problems += [f"not in this model: {name}" for name in state if name not in target]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(value.shape)}"
        for name, value in target.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ModelError("these weights do not fit the model:\n  " + "\n  ".join(problems[:8]) + more)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.zero_()
            true_rows(name, param, model.cfg).copy_(state[name])
