"""The plan of a run on the device at hand: shown before step 1, held against what was measured at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megapre import kernels, plan
from megapre.errors import UserError
from megapre.optim.scaling import INITIAL
from megapre.plan.memory import all_ranks

from . import machine
from .metrics import bytes_text

if TYPE_CHECKING:
    import torch

    from megapre.config import Config
    from megapre.config.schema import Model
    from megapre.mesh import Mesh
    from megapre.parallel.comm import Place


class TooLarge(UserError):
    """The model's weights and optimizer alone exceed the memory of the device, or that ranks share."""


def plan_of(cfg: Config, device: torch.device, mesh: Mesh, here: Place) -> plan.Plan:
    """The prediction for the ranks of `mesh` on devices like `device`.

    Raises TooLarge where not even the parameters' state would fit: of the rank that is `here`, and on a CPU of all
    ranks on its machine together.
    """
    ops = kernels.choose(device.type, cfg.kernels, machine.DTYPES[cfg.run.dtype])
    fused_loss = ops.names["cross_entropy"] != "reference"
    found = plan.predict(cfg, mesh, device.type, machine.describe(device), fused_loss)
    stages = all_ranks(cfg, mesh.dp, device.type, fused_loss)
    first = here.rank - here.local_rank
    sharers = range(first, first + here.local_world) if device.type == "cpu" else (here.rank,)
    room, needed = machine.memory_size(device), sum(stages[mesh.coords(rank).pp].states for rank in sharers)
    if needed > room:
        where = "alone"
        if mesh.world > 1:
            where = f"of the {len(sharers)} ranks on this machine" if device.type == "cpu" else f"on rank {here.rank}"
        more = ", or more ranks (layout.tp, layout.pp)" if mesh.world > 1 or device.type == "cuda" else ""
        raise TooLarge(
            f"model: {sum(found.parameters):,} parameters take {bytes_text(needed)} for weights, gradients, master "
            f"weights and moments {where}, but {found.device} has {bytes_text(room)}; choose a smaller model{more}"
        )
    return found if device.type == "cpu" and len(sharers) > 1 else replace(found, room=room)


def box(found: plan.Plan, used: dict[str, str], run_folder: str) -> str:
    """The boxed plan with this machine's kernels, by class of calls where that matters, and the folder of the run."""
    by_name: dict[str, list[str]] = {}
    absent = others(found.cfg.model)
    for op, name in used.items():
        if op in absent:
            continue
        classes = kernels.serves(op, name)
        by_name.setdefault(name, []).append(f"{op} ({classes})" if classes else op)
    lines = "\n".join(f"{name}: {', '.join(ops)}" for name, ops in sorted(by_name.items()))
    return plan.render(found, {"precision": precision(found.cfg), "kernels": lines, "run folder": run_folder})


def others(model: Model) -> set[str]:
    """The ops of norms, positions and activations that `model` does not have."""
    choices = {"layer_norm", "rms_norm", "rope", "rope_", "gelu", "swiglu", "geglu"}
    own = {"layer_norm" if model.norm == "layernorm" else "rms_norm", model.activation}
    own |= {"rms_norm"} if model.qk_norm else set()
    return choices - own - ({"rope", "rope_"} if model.positions == "rope" else set())


def precision(cfg: Config) -> str:
    """What a run keeps its weights, moments and gradients in, and how it scales its loss."""
    optim, dtype = cfg.optim, cfg.run.dtype
    if dtype == "fp16":
        scale = f"loss times {optim.loss_scale or INITIAL:.10g}"
        if not optim.loss_scale:
            scale += f", halved at overflow, doubled after {optim.loss_scale_window:,} good steps"
        return f"fp16 weights, fp32 master and moments; {scale}"
    if dtype == "fp32":
        return "fp32"
    sums = "" if optim.grad_dtype == "fp32" else f"; gradients summed in {optim.grad_dtype}"
    if optim.master == "none":
        return f"{dtype} weights without master, rounded at random; {optim.moments} moments{sums}"
    return f"{dtype} weights, fp32 master and moments{sums}"
