"""One training step: schedule -> executor -> gradient buffers -> optimizer.

The loss of a step is the mean over all its valid tokens, however they are spread over micro-batches and replicas: each
micro-batch contributes its *sum* of token losses, and its backward starts from 1 / (valid tokens of the step). Nothing
in a step of one rank waits for the device: loss, gradient norm and the decision to skip a non-finite update stay there
until somebody logs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megapre.mesh import Mesh, MeshError
from megapre.model.decay import decays
from megapre.model.init import initialize
from megapre.optim.adamw import AdamW
from megapre.optim.clipping import clip_factor, not_finite
from megapre.optim.scaling import LossScale
from megapre.parallel.comm import Groups, Place, connect
from megapre.parallel.data import FlatParameters
from megapre.parallel.pipeline import Executor
from megapre.parallel.pipes import Pipes
from megapre.parallel.tuned import options
from megapre.plan.flat import BUCKET_ELEMENTS
from megapre.plan.partition import schedule_of
from megapre.schedule import placement_of

from .fixed import FixedInputs
from .graph import CudaRecorder, GraphError, Recorded, own_stream, refusal
from .machine import DTYPES
from .stage import Feed, Stage, build_pieces, parameters, share_of, stream_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megapre.config import Config
    from megapre.data import GlobalBatch
    from megapre.model.transformer import Transformer
    from megapre.parallel.comm import Options
    from megapre.parallel.trace import Trace


class StepResult(NamedTuple):
    """0-dim fp32 tensors on the device. `skipped` is 1 where loss or norm was not finite and nothing was updated.

    Loss and norm are those of the loss itself, whatever `loss_scale` its backward ran with; that is None but in fp16.
    `stops`: the number of ranks that were asked to stop before this step.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    stops: Tensor
    loss_scale: Tensor | None = None


def mesh_of(cfg: Config, here: Place) -> Mesh:
    """The ranks of a run, cut as the layout asks. Raises MeshError, and ConfigError where the batch cannot be cut."""
    layout = cfg.layout
    if layout.cp > 1:
        raise MeshError(f"layout: cp = {layout.cp}: no attention here reads keys of another rank; set layout.cp to 1")
    try:
        mesh = Mesh.of(layout, here.world)
    except MeshError as error:
        if here.world > 1:
            raise
        raise MeshError(f"{error}; several ranks are started by `megapre launch local` or torchrun") from None
    cfg.batch.micro_batches(mesh.dp)
    return mesh


def connected(cfg: Config, here: Place, device: torch.device, measured: Mapping[str, Options] | None = None) -> Groups:
    """The groups that `cfg`'s layout needs, among `here.world` ranks, with the config's options and those `measured`.

    Raises MeshError, ConfigError, ScheduleError and CommError.
    """
    layout, model = cfg.layout, cfg.model
    v = placement_of(layout.schedule) == "v"
    return connect(
        mesh_of(cfg, here),
        here.rank,
        device,
        embedding=model.tied and not v,
        wrap=layout.vpp > 1 and not v,
        kv=max(layout.tp // model.kv_heads, 1),
        options=options(cfg.comm, measured or {}),
    )


class Engine:
    """Everything a step works on, on one rank, built from a config whose vocabulary is known.

    `groups` are this rank's, of a mesh with the config's layout (`connected`); None: it is the only rank. `models` are
    its pieces of the model, in model order. `whole` is whether weights, moments and counts are all of one step: an
    error amid an update leaves some of the step before. Raises KernelUnavailable, and GraphError where run.cuda_graph
    cannot be.
    """

    def __init__(self, cfg: Config, device: torch.device, groups: Groups | None = None) -> None:
        self.cfg, self.device, self.whole = cfg, device, True
        self.groups = groups = connected(cfg, Place(), device) if groups is None else groups
        if cfg.run.cuda_graph:
            if why_not := refusal(device, groups.world.size):
                raise GraphError(why_not)
            own_stream(device)
        plan = schedule_of(cfg, groups.dp.size)
        self.models = build_pieces(cfg, groups, plan)
        self.ops = self.models[0].ops
        for model in self.models:
            initialize(model, cfg.run.seed)
        self.flat = FlatParameters(
            parameters(self.models),
            decays,
            cfg.layout.bucket or BUCKET_ELEMENTS,
            keep_master=cfg.optim.master == "fp32",
            grad_dtype=DTYPES[cfg.optim.grad_dtype],
            share=lambda name: share_of(name, cfg, groups),
            replicas=groups.dp_cp,
            sharded=cfg.layout.shard_optimizer,
        )
        if self.flat.exchange is not None and not cfg.run.compile:
            for model in self.models:
                model.before_use = self.flat.exchange.ready
        self.optimizer = AdamW(self.flat.groups, cfg.optim, self.ops.adamw_, self.ops.adamw_stochastic_, cfg.run.seed)
        self.loss_scale = LossScale(cfg.optim, device) if cfg.run.dtype == "fp16" else None
        recorded = cfg.run.cuda_graph
        fixed = FixedInputs(device, recorded) if recorded or cfg.run.compile else None
        self.feed = Feed(cfg.model.vocab, device, self.loss_scale, fixed)
        self.stages = [Stage(model, self.feed, self.flat, cfg.run.compile) for model in self.models]
        pipes = None
        if groups.pp.size > 1:
            # Shorter than that of the groups, which do not know what they wait for.
            patience = 0.8 * cfg.comm.timeouts.get("send", cfg.comm.timeout)
            pipes = Pipes(groups, stream_shape(cfg, groups), DTYPES[cfg.run.dtype], patience)
        self.executor = Executor(plan, self.stages, pipes)
        self.evaluator = Executor(plan, self.stages, pipes, evaluation=True)
        self.recorded = Recorded(self._on_device, CudaRecorder()) if recorded else None

    @property
    def model(self) -> Transformer:
        """The whole model, where each rank has it."""
        assert self.groups.mesh.world == self.groups.dp.size and len(self.models) == 1, "the model is in pieces"
        return self.models[0]

    def step(self, batch: GlobalBatch, lr: float, trace: Trace | None = None, stop: bool = False) -> StepResult:
        """Forward and backward of every micro-batch of `batch`, this rank's share, then one update at rate `lr`.

        `stop`: this rank has been asked to stop, which the result tells all of them. The result is the same on every
        rank. Raises DataError for a token outside the vocabulary, PipelineError and GraphError.
        """
        self.feed.take(batch, self._valid_tokens(batch), stop)
        self.optimizer.lr.fill_(lr)
        if self.recorded is not None and self.feed.fixed is not None and trace is None:
            self.whole = False  # how far a replay has come, the host does not know
            result = self.recorded(self.feed.fixed.shapes)
        else:
            result = self._on_device(trace)
        self.whole = True  # nothing may come between here and the count of the step
        return result

    def _on_device(self, trace: Trace | None = None) -> StepResult:
        """The step, of what `feed` and the optimizer's rate hold. On one rank nothing in here depends on the host: run
        once more with other values in the same memory, it issues the same operations.
        """
        exchange = self.flat.exchange
        if exchange is not None and self.cfg.run.compile:
            exchange.ready()
        self.flat.begin_step()
        self.executor.run(trace)
        phase = _nothing if trace is None else trace.phase
        phase("sum of gradients")
        self.flat.finish_step()
        phase("norm and loss")
        counted = self.flat.counted()
        norm = self.ops.grad_norm(counted) if counted else torch.zeros_like(self.feed.total)
        loss, norm, stops = self._over_all_ranks(self.feed.total, norm)
        scale = None if self.loss_scale is None else self.loss_scale.scale.clone()
        norm = norm if scale is None else norm / scale
        skipped = not_finite(loss, norm)
        factor = clip_factor(norm, self.cfg.optim.clip)
        if scale is not None:
            factor = (1.0 if factor is None else factor) / scale
        phase("update")
        self.whole = False
        self.optimizer.step(None, factor, skipped)
        if self.loss_scale is not None:
            self.loss_scale.update(skipped)
        if exchange is not None:
            phase("parameters handed round")
            exchange.gather()
        phase("")
        return StepResult(loss, norm, skipped, stops, scale)

    def evaluate(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """The summed loss of `batch` and its tokens with a loss, over the shares of all ranks; the same on each."""
        self.settle()
        self.feed.take(batch, 1.0)
        self.evaluator.run()
        loss, *_ = self._over_all_ranks(self.feed.total, torch.zeros_like(self.feed.total))
        return loss, torch.as_tensor(self._valid_tokens(batch), device=self.device)

    def settle(self) -> None:
        """Waits until every parameter here is what the last update has made of it, on whatever rank."""
        self.executor.settle()
        if self.flat.exchange is not None:
            self.flat.exchange.ready()

    def _valid_tokens(self, batch: GlobalBatch) -> Tensor | float:
        groups = self.groups
        if groups.dp_cp.size == 1:
            return float(batch.valid_tokens)
        tokens = torch.full((), float(batch.valid_tokens), dtype=torch.float64, device=self.device)
        # In the replicas' own group it would queue behind the parameters that are still being handed round.
        dist.all_reduce(tokens, group=groups.world.handle)
        return tokens / (groups.world.size // groups.dp_cp.size)

    def _over_all_ranks(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the replicas' losses, the norm of all gradients from those of the ranks, and the number of those
        asked to stop, in one collective.

        Ranks of one tensor-parallel group have the same loss; only those with the last stage have one.
        """
        told = self.models[-1].piece.last and self.groups.tp.index == 0
        stops = self.feed.stop
        if self.groups.world.size == 1:
            return loss.clone(), norm, stops.clone()
        self.executor.settle()
        sums = torch.stack([loss if told else torch.zeros_like(loss), norm, stops]).double()
        sums[1] **= 2
        dist.all_reduce(sums, group=self.groups.world.handle)
        return sums[0].float(), sums[1].sqrt().float(), sums[2].float()


def _nothing(_: str) -> None:
    """For a step that nobody traces."""
