"""What a checkpoint of a training run holds, by parameter name and free of any layout.

Vocabulary matrices are padded to a multiple of 128 rows in memory; a checkpoint holds the true rows. Ranks write what
they hold, and what several hold the first of them writes; any other layout reads it again (pieces.py). An fp32 run has
no separate master weights, nor has a bf16 run with optim.master = "none", so none are written. Once the weights are
initialized, training draws no random numbers but those that follow from seed and update count, so there is no
generator's state to keep, and a run can go on on another kind of device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from megapre.model.cut import Held, held
from megapre.model.state import export_state

from .pieces import Piece, Pieces, of_range, whole

if TYPE_CHECKING:
    from megapre.config import Model
    from megapre.model.transformer import Transformer
    from megapre.optim.adamw import AdamW
    from megapre.optim.scaling import LossScale
    from megapre.parallel.comm import Groups
    from megapre.parallel.data import FlatParameters, Slot


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """The model's parameters by checkpoint name (views of the live weights), enough to evaluate and to sample."""
    return {f"model.{name}": parameter for name, parameter in export_state(model).items()}


def training_tensors(
    cfg: Model, flat: FlatParameters, optimizer: AdamW, loss_scale: LossScale | None, groups: Groups
) -> dict[str, Pieces]:
    """Parameters, master weights, moments and loss scale: what this rank holds of them, as views that saving reads and
    loading fills in place, and what of it this rank writes.
    """
    first = groups.rank == 0
    tensors = {"optim.updates": whole(optimizer.updates, first)}
    if loss_scale is not None:
        tensors |= {name: whole(tensor, first) for name, tensor in loss_scale.tensors().items()}
    for group, exp_avg, exp_avg_sq in zip(flat.groups, optimizer.exp_avg, optimizer.exp_avg_sq, strict=True):
        for slot in group.slots.values():
            place = held(slot.name, slot.shape, cfg, groups.tp.index, groups.tp.size)
            writes = group.written(slot)
            all_of_it = [(slice(slot.start, slot.stop), group.param[slot.start : slot.stop])]
            tensors[f"model.{slot.name}"] = _pieces(place, slot, all_of_it, writes if groups.dp_cp.index == 0 else [])
            buffers = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            if group.master is not group.param:
                buffers["master"] = group.master
            if group.shards.size == 1 and groups.dp_cp.index:
                writes = []
            for kind, buffer in buffers.items():
                tensors[f"{kind}.{slot.name}"] = _pieces(place, slot, group.states(slot, buffer), writes)
    return tensors


def _pieces(place: Held, slot: Slot, here: Sequence[tuple[slice, Tensor]], writes: Sequence[tuple[int, int]]) -> Pieces:
    """`here`: elements of the group's buffers that belong to the parameter `slot`, and their values; of these, those
    within `writes` are written.
    """
    kept: list[Piece] = []
    written: list[Piece] = []
    for at, values in here:
        kept += of_range(place, slot.shape, values, at.start - slot.start)
        for first, last in writes:
            start, stop = max(first, at.start), min(last, at.stop)
            if start < stop:
                part = values[start - at.start : stop - at.start]
                written += of_range(place, slot.shape, part, start - slot.start)
    return Pieces(place.shape, tuple(kept), tuple(written))
