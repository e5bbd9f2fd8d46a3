"""One training step: schedule -> executor -> gradient buffers -> optimizer.

The loss of a step is the mean over all its valid tokens, however they are spread over micro-batches: each micro-batch
contributes its *sum* of token losses, and its backward starts from 1 / (valid tokens of the step). Nothing in a step
waits for the device: loss, gradient norm and the decision to skip a non-finite update stay there until somebody logs
them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megapre import kernels, schedule
from megapre.data import DataError
from megapre.model.decay import decays
from megapre.model.init import initialize
from megapre.model.recompute import Recompute
from megapre.model.transformer import Transformer
from megapre.optim.adamw import AdamW
from megapre.optim.clipping import clip_factor, not_finite
from megapre.optim.scaling import LossScale
from megapre.parallel.data import FlatParameters
from megapre.parallel.pipeline import Executor

from .machine import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from megapre.config import Config, Layout
    from megapre.data import GlobalBatch, MicroBatch


class StepResult(NamedTuple):
    """0-dim fp32 tensors on the device. `skipped` is 1 where loss or norm was not finite and nothing was updated.

    Loss and norm are those of the loss itself, whatever `loss_scale` its backward ran with; that is None but in fp16.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    loss_scale: Tensor | None = None


class WholeModel:
    """The chunk of a pipeline of one stage: tokens go in, the loss comes out."""

    def __init__(
        self, loss: Callable[..., Tensor], vocab: int, device: torch.device, loss_scale: LossScale | None = None
    ) -> None:
        self.loss, self.loss_scale = loss, loss_scale
        self.vocab = vocab
        self.device = device
        self.micro_batches: tuple[MicroBatch, ...] = ()
        self.losses: dict[int, Tensor] = {}
        self.total = torch.zeros((), device=device)
        self.per_token = torch.ones((), device=device)
        # What every backward begins with. In fp16 it goes into the logits' gradient before that is rounded.
        self.upstream = self.per_token if loss_scale is None else torch.ones((), device=device)

    def feed(self, batch: GlobalBatch) -> None:
        """Takes the next step's micro-batches, sets the scale of every backward and starts the step's loss at zero.

        Raises DataError for a token outside the vocabulary.
        """
        check_tokens(batch, self.vocab)
        self.micro_batches = batch.micro_batches
        self.per_token.fill_(1.0 / max(batch.valid_tokens, 1))
        if self.loss_scale is not None:
            torch.mul(self.per_token, self.loss_scale.scale, out=self.upstream)
        self.total.zero_()

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        assert x is None, "the first chunk fetches its own input"
        loss = self.loss(*inputs(self.micro_batches[micro_batch], self.device), self.upstream)
        self.losses[micro_batch] = loss
        return loss

    def backward(self, micro_batch: int, grad: Tensor | None) -> None:
        assert grad is None, "the last chunk's output is the loss"
        loss = self.losses.pop(micro_batch)
        loss.backward(self.upstream)
        self.total += loss.detach() * self.per_token


class Engine:
    """Everything a step works on, built from a config whose vocabulary is known."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.model = build_model(cfg, device)
        self.ops = self.model.ops
        initialize(self.model, cfg.run.seed)
        self.flat = FlatParameters(
            self.model.named_parameters(),
            decays,
            keep_master=cfg.optim.master == "fp32",
            grad_dtype=DTYPES[cfg.optim.grad_dtype],
        )
        self.optimizer = AdamW(self.flat.groups, cfg.optim, self.ops.adamw_, self.ops.adamw_stochastic_, cfg.run.seed)
        self.loss_scale = LossScale(cfg.optim, device) if cfg.run.dtype == "fp16" else None
        loss = torch.compile(self.model.loss, dynamic=False) if cfg.run.compile else self.model.loss
        self.chunk = WholeModel(loss, cfg.model.vocab, device, self.loss_scale)
        micro_batches = cfg.batch.micro_batches(dp=1)
        self.executor = Executor(schedule.build(cfg.layout.schedule, 1, 1, micro_batches), [self.chunk])

    def step(self, batch: GlobalBatch, lr: float) -> StepResult:
        """Forward and backward of every micro-batch of `batch`, then one update at rate `lr`."""
        self.chunk.feed(batch)
        self.flat.begin_step()
        self.executor.run()
        self.flat.finish_step()
        norm = self.ops.grad_norm([group.grad for group in self.flat.groups])
        if self.loss_scale is None:
            skipped = not_finite(self.chunk.total, norm)
            self.optimizer.step(lr, clip_factor(norm, self.cfg.optim.clip), skipped)
            return StepResult(self.chunk.total.clone(), norm, skipped)
        scale = self.loss_scale.scale.clone()
        norm = norm / scale
        skipped = not_finite(self.chunk.total, norm)
        factor = clip_factor(norm, self.cfg.optim.clip)
        self.optimizer.step(lr, (1.0 if factor is None else factor) / scale, skipped)
        self.loss_scale.update(skipped)
        return StepResult(self.chunk.total.clone(), norm, skipped, scale)


def build_model(cfg: Config, device: torch.device) -> Transformer:
    """The model over the kernels of `device`, its weights not yet set. Raises KernelUnavailable."""
    dtype = DTYPES[cfg.run.dtype]
    ops = kernels.choose(device.type, cfg.kernels, dtype)
    return Transformer(cfg.model, ops, dtype=dtype, device=device, recompute=recompute_of(cfg.layout))


def recompute_of(layout: Layout) -> Recompute:
    names = layout.recompute
    blocks = (layout.recompute_layers or sys.maxsize) if "block" in names else 0
    return Recompute("norm" in names, "activation" in names, blocks, layout.recompute_group)


def check_tokens(batch: GlobalBatch, vocab: int) -> None:
    """Raises DataError for a token outside the vocabulary, which a device would answer with a crash or worse."""
    for part in batch.micro_batches:
        outside = (part.tokens < 0) | (part.tokens >= vocab)
        if outside.any():
            raise DataError(
                f"the data holds token {int(part.tokens[outside][0])}, the model knows 0 .. {vocab - 1}: the data is "
                f"damaged, or made with another tokenizer, or model.vocab = {vocab} is too small for it"
            )


def inputs(micro_batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments of `Transformer.loss` on the device; to CUDA through pinned memory, overlapping what runs there."""

    def move(tensor: Tensor) -> Tensor:
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    part = micro_batch
    return (
        move(part.tokens),
        move(part.labels),
        None if part.positions is None else move(part.positions),
        None if part.cu_seqlens is None else move(part.cu_seqlens),
    )
