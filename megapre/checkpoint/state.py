"""What a checkpoint of a training run holds, by parameter name and free of any layout.

Vocabulary matrices are padded to a multiple of 128 rows in memory; a checkpoint holds the true rows. An fp32 run has no
separate master weights, so none are written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megapre.model.state import export_state, true_rows

if TYPE_CHECKING:
    from megapre.model.transformer import Transformer
    from megapre.optim.adamw import AdamW
    from megapre.parallel.data import FlatParameters


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """The model's parameters by checkpoint name (views of the live weights), enough to evaluate and to sample."""
    return {f"model.{name}": parameter for name, parameter in export_state(model).items()}


def training_tensors(model: Transformer, flat: FlatParameters, optimizer: AdamW) -> dict[str, Tensor]:
    """Parameters, master weights and moments as views: saving reads them, loading fills them in place."""
    tensors = model_tensors(model) | {"optim.updates": optimizer.updates}
    for group, exp_avg, exp_avg_sq in zip(flat.groups, optimizer.exp_avg, optimizer.exp_avg_sq, strict=True):
        buffers = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if group.master is not group.param:
            buffers["master"] = group.master
        for kind, buffer in buffers.items():
            for name, slot in group.slots.items():
                tensors[f"{kind}.{name}"] = true_rows(name, slot.view(buffer), model.cfg)
    return tensors


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators: the CPU's and, on a GPU, that device's."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def set_rng(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
