"""What a communication profile (plan/comm_profile.py) says for the ranks that run here, where the config names one.

What the config says itself goes before it. All ranks do alike: the first reads the file, and where it finds nothing
measured on just these machines, software and layout, or where a rank is on another machine than the first, everything
stays as it is and the state says why; the run tells it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from megapre.config import Comm, Config, Layout
from megapre.config.schema import Axis
from megapre.kernels import choose
from megapre.kernels import profile as kernel_profile
from megapre.mesh import Mesh
from megapre.plan import comm_profile

from .comm import CommError, Options, Place, everybody, gathered
from .trials import Sizes

DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Tuned:
    """The layout with what the profile chose filled in, options of the communicators by axis, and in words why."""

    layout: Layout
    options: Mapping[str, Options] = field(default_factory=dict)
    state: str = ""


def machine(device: torch.device, here: Place) -> dict[str, str | int]:
    """What communication depends on, of this rank's machine and of how many there are."""
    cuda = device.type == "cuda"
    nodes = -(-here.world // here.local_world)
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "default interface") if nodes > 1 else "one node"
    return {
        "device": device.type,
        "hardware": kernel_profile.hardware("cuda" if cuda else "cpu"),
        "torch": torch.__version__,
        "backend": f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}" if cuda else "gloo",
        "driver": _driver() if cuda else "none",
        "nodes": nodes,
        "ranks_per_node": here.local_world,
        "topology": _topology() if cuda else interface,
    }


def key(device: torch.device, here: Place, mesh: Mesh) -> dict[str, str | int]:
    """What links must have been measured on to count: the machine, and who is whose neighbour."""
    return {**machine(device, here), "tp": mesh.tp, "pp": mesh.pp, "cp": mesh.cp, "dp": mesh.dp}


def work(cfg: Config, device: torch.device) -> dict[str, str | int]:
    """What settings that were chosen depend on besides: sizes, dtypes and ways of the work that hides communication
    (`trials`), and what does it. The vocabulary of `cfg` must be known.
    """
    sizes, layout = Sizes.of(cfg), cfg.layout
    return {
        "gradients_of_a_rank": sizes.elements,
        "hidden": sizes.hidden,
        "ffn": sizes.ffn,
        "tokens": sizes.tokens,
        "dtype": cfg.run.dtype,
        "grad_dtype": cfg.optim.grad_dtype,
        "shard_optimizer": str(layout.shard_optimizer).lower(),
        "sequence_parallel": str(layout.sequence_parallel).lower(),
        "linear": choose(device.type, cfg.kernels, sizes.dtype).names["linear"],
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
    }


def tuned(cfg: Config, here: Place, device: torch.device) -> Tuned:
    """The layout of `cfg` and options as its comm_profile says; by all ranks, after `join`. `state` says where it is
    refused. The vocabulary must be known.

    Raises MeshError where the layout does not fit the ranks, KernelUnavailable.
    """
    layout = cfg.layout
    if not layout.comm_profile:
        return Tuned(layout, state="none: layout.comm_profile names none")
    own = {**key(device, here, Mesh.of(layout, here.world)), **work(cfg, device)}
    file = comm_profile.path(layout.comm_profile)
    answer = comm_profile.find(file, own, "chosen") if here.rank == 0 else None
    keys, answers = zip(*gathered((own, answer), everybody(here)), strict=True)
    found, why = answers[0]
    for rank, theirs in enumerate(keys):
        for name in own:
            if found is not None and theirs[name] != keys[0][name]:
                found, why = None, f"{name} of rank 0 is {keys[0][name]}, of rank {rank} {theirs[name]}"
    if found is None:
        return Tuned(layout, state=f"ignored: {why}")
    return _filled(layout, found, file)


def _filled(layout: Layout, profile: comm_profile.Profile, file: Path) -> Tuned:
    chosen = profile.chosen or {}
    changes: dict[str, Any] = {}
    if "bucket_elements" in chosen and not layout.bucket:
        changes["bucket"] = chosen["bucket_elements"]
    gathers = layout.tp > 1 and layout.sequence_parallel  # as overlap_products needs; the recipe tuned had them
    if "overlap_products" in chosen and "overlap_products" not in layout.model_fields_set and gathers:
        changes["overlap_products"] = chosen["overlap_products"]
    options = {axis: options_of(given) for axis, given in chosen.get("options", {}).items()}
    said = [f"{name} = {value}" for name, value in changes.items()] + [f"options of {axis}" for axis in options]
    state = f"used: {file} of {profile.made}: {', '.join(said) or 'the defaults are the fastest'}"
    return Tuned(layout.model_copy(update=changes), options, state)


def options_of(given: Mapping[str, Any]) -> Options:
    """Options as a profile writes them. Raises CommError for what there is not."""
    try:
        return Options(**given)
    except TypeError as error:
        raise CommError(f"communication profile: {dict(given)} are no options ({error}); measure again") from None


def options(comm: Comm, measured: Mapping[str, Options]) -> dict[str, Options]:
    """Of the communicators, by axis: what was measured, and before it what the config says."""
    found = {}
    for axis in get_args(Axis):
        base = measured.get(axis, Options())
        found[axis] = replace(
            base,
            timeout=comm.timeouts.get(axis, comm.timeout),
            high_priority=base.high_priority or axis in comm.high_priority,
            nccl={**base.nccl, **comm.nccl.get(axis, {})},
        )
    return found


def _driver() -> str:
    return DRIVER.read_text(encoding="utf-8").splitlines()[0].strip() if DRIVER.exists() else "unknown"


def _topology() -> str:
    """A digest of the links between the GPUs and network cards of this node, as `nvidia-smi topo -m` draws them."""
    try:
        drawn = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return hashlib.sha256(drawn).hexdigest()[:16]
