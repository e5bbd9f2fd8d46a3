"""Bytes that training takes on one rank, by category: what its flat buffers hold, and the peak of a step's activations.

The state is exact, gaps in the buffers included (buffers.py). For activations a rank's program is walked with what each
of its chunks keeps, so that the peak is where it is: with unequal stages, on a V, and where I and W are apart.
"""

from dataclasses import asdict, dataclass

from ..config import Config
from ..schedule import Schedule
from ..schedule.held import peak_kept
from .activations import ELEMENT, stage_activations
from .buffers import Held, elements
from .partition import layers_of_stages, schedule_of


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step."""

    weights: int
    gradients: int
    master: int
    moments: int
    activations: int
    logits: int

    @property
    def states(self) -> int:
        """Of the parameters: there from the first step to the last."""
        return self.weights + self.gradients + self.master + self.moments

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def fullest_rank(
    cfg: Config, dp: int = 0, device: str = "cpu", fused_loss: bool = True, plan: Schedule | None = None
) -> Memory:
    """Memory of the pipeline rank that needs most, of `dp` replicas (0: layout.dp, or one).

    `plan` is the schedule (None: the layout's). Raises ScheduleError, StageError, and ConfigError where the batch
    cannot be cut. What the process itself takes (the interpreter, libraries, a CUDA context), allocator fragmentation
    and what kernels hold while they run come on top. The most of the last is attention's on a CPU, which sums dk and dv
    of a head in fp32 for every thread: 8 * seq_length * head_dim bytes a thread, at most twice that.
    """
    return max(all_ranks(cfg, dp, device, fused_loss, plan), key=lambda memory: memory.total)


def all_ranks(
    cfg: Config, dp: int = 0, device: str = "cpu", fused_loss: bool = True, plan: Schedule | None = None
) -> list[Memory]:
    """Of each pipeline rank; arguments as `fullest_rank`.

    States: 16-bit weights 2, fp32 gradients 4, fp32 master 4 and moments 8 bytes an element, the last two cut over
    the replicas with layout.shard_optimizer; fp32 weights, and with optim.master = "none" bf16 ones, are their own
    master. bf16 gradients take 2, bf16 moments 4.
    """
    layout, optim, element = cfg.layout, cfg.optim, ELEMENT[cfg.run.dtype]
    replicas = dp or layout.dp or 1
    plan = schedule_of(cfg, replicas) if plan is None else plan
    cut = layers_of_stages(cfg, plan.chunks, plan.placement)
    stages = stage_activations(cfg, cut, device, fused_loss)
    found = []
    for rank, program in enumerate(plan):
        held = [plan.stage_of(rank, chunk) for chunk in range(plan.chunks)]
        whole, kept = elements(cfg, Held.of(held, cut), replicas if layout.shard_optimizer else 1)
        peak = peak_kept(program, [stages[stage] for stage in held])
        logits = peak.besides if peak.at is not None and peak.at.kind == "F" else 0
        found.append(
            Memory(
                weights=whole * element,
                gradients=whole * ELEMENT[optim.grad_dtype],
                master=0 if element == 4 or optim.master == "none" else 4 * kept,
                moments=2 * kept * ELEMENT[optim.moments],
                activations=int(peak.total - logits),
                logits=int(logits),
            )
        )
    return found
