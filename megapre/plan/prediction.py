"""What a run will be, in numbers, before its first step."""

from dataclasses import dataclass
from typing import Any, Protocol

from ..config import Config
from . import flops, hardware, memory, params


class Grid(Protocol):
    """What the plan needs of a mesh (`megapre.mesh.Mesh`): its sizes, and that it prints as a picture."""

    @property
    def world(self) -> int: ...
    @property
    def dp(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """The prediction for `cfg` on `mesh`. Tokens and FLOPs are those of all ranks together."""

    cfg: Config
    mesh: Grid
    device: str
    parameters: params.Parameters
    micro_batches: int
    flops_per_token: int
    flops_per_token_full: int
    memory: memory.Memory
    peak: float | None
    room: int | None
    """Bytes of memory that one device has, None where that is not known."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.cfg.batch.tokens * self.cfg.run.steps

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the dense peak of all devices that `tokens_per_s` tokens a second are; None on unknown hardware."""
        return None if self.peak is None else tokens_per_s * self.flops_per_token / (self.peak * self.mesh.world)

    def as_json(self) -> dict[str, Any]:
        """For plan.json."""
        cfg = self.cfg
        return {
            "name": cfg.name,
            "world": self.mesh.world,
            "layout": {**cfg.layout.model_dump(), "dp": self.mesh.dp},
            "parameters": {**self.parameters._asdict(), "total": sum(self.parameters)},
            "micro_batches": self.micro_batches,
            "tokens_per_step": cfg.batch.tokens,
            "steps": cfg.run.steps,
            "tokens": self.tokens,
            "flops_per_token": self.flops_per_token,
            "flops_per_token_full_attention": self.flops_per_token_full,
            "flops_convention": f"causal attention counted as {flops.CONVENTION}",
            "flops": self.flops_per_token * self.tokens,
            "memory_bytes": self.memory.as_json(),
            "device": self.device,
            "peak_flops_per_s": self.peak,
            "device_memory_bytes": self.room,
        }


def predict(cfg: Config, mesh: Grid, device: str = "cpu", name: str = "", fused_loss: bool = True) -> Plan:
    """The plan of `cfg`, whose vocabulary must be known, on `mesh` with devices of type `device` ("cpu" or "cuda") that
    the driver calls `name`. `fused_loss`: whether cross-entropy is one kernel there. Raises ConfigError where the batch
    cannot be cut over the mesh, StageError and ScheduleError.
    """
    found = hardware.find(name)
    return Plan(
        cfg=cfg,
        mesh=mesh,
        device=name or device,
        parameters=params.count(cfg.model),
        micro_batches=cfg.batch.micro_batches(mesh.dp),
        flops_per_token=flops.per_token(cfg.model, cfg.batch.seq_length),
        flops_per_token_full=flops.per_token(cfg.model, cfg.batch.seq_length, "full"),
        memory=memory.fullest_rank(cfg, mesh.dp, device, fused_loss),
        peak=found.peak(cfg.run.dtype) if found else None,
        room=found.memory * 2**30 if found else None,
    )
