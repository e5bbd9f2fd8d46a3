"""What a checkpoint of a training run holds, by parameter name and free of any layout.

Vocabulary matrices are padded to a multiple of 128 rows in memory; a checkpoint holds the true rows. An fp32 run has no
separate master weights, nor has a bf16 run with optim.master = "none", so none are written. Once the weights are
initialized, training draws no random numbers but those that follow from seed and update count, so there is no
generator's state to keep, and a run can go on on another kind of device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megapre.model.state import export_state, true_rows

if TYPE_CHECKING:
    from megapre.model.transformer import Transformer
    from megapre.optim.adamw import AdamW
    from megapre.optim.scaling import LossScale
    from megapre.parallel.data import FlatParameters


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """The model's parameters by checkpoint name (views of the live weights), enough to evaluate and to sample."""
    return {f"model.{name}": parameter for name, parameter in export_state(model).items()}


def training_tensors(
    model: Transformer, flat: FlatParameters, optimizer: AdamW, loss_scale: LossScale | None
) -> dict[str, Tensor]:
    """Parameters, master weights, moments and loss scale as views: saving reads them, loading fills them in place."""
    tensors = model_tensors(model) | {"optim.updates": optimizer.updates}
    if loss_scale is not None:
        tensors |= loss_scale.tensors()
    for group, exp_avg, exp_avg_sq in zip(flat.groups, optimizer.exp_avg, optimizer.exp_avg_sq, strict=True):
        buffers = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if group.master is not group.param:
            buffers["master"] = group.master
        for kind, buffer in buffers.items():
            for name, slot in group.slots.items():
                tensors[f"{kind}.{name}"] = true_rows(name, slot.view(buffer), model.cfg)
    return tensors
