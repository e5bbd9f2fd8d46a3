"""A pipeline's chunks over the real model: a rank's pieces of it, what feeds them, and their split backward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megapre import kernels
from megapre.data import DataError
from megapre.model.cut import is_cut, local, needs_sum, short
from megapre.model.recompute import Recompute
from megapre.model.transformer import Piece, Transformer
from megapre.parallel.data import NOT_SHARED, FlatParameters, Share
from megapre.parallel.tensor import TensorGroup
from megapre.plan import buffers
from megapre.plan.partition import layers_of_stages

from .fixed import FixedInputs, Inputs
from .machine import DTYPES

if TYPE_CHECKING:
    from megapre.config import Config, Layout
    from megapre.data import GlobalBatch, MicroBatch
    from megapre.optim.scaling import LossScale
    from megapre.parallel.comm import Groups
    from megapre.schedule import Schedule


def build_model(cfg: Config, device: torch.device) -> Transformer:
    """The whole model over the kernels of `device`, its weights not yet set. Raises KernelUnavailable."""
    return _maker(cfg, device)()


def build_pieces(cfg: Config, groups: Groups, plan: Schedule) -> list[Transformer]:
    """This rank's pieces of the model, in model order. Both ends on one rank share a tied embedding."""
    tensor, tp, layout = None, groups.tp, cfg.layout
    if tp.handle is not None:
        tensor = TensorGroup(tp.handle, tp.index, tp.size, layout.sequence_parallel, layout.overlap_products)
    make = _maker(cfg, groups.device, tensor)
    bounds = list(accumulate(layers_of_stages(cfg, placement=plan.placement), initial=0))
    stages = sorted(plan.stage_of(groups.pp.index, chunk) for chunk in range(plan.chunks))
    models = [
        make(piece=Piece(stage == 0, range(bounds[stage], bounds[stage + 1]), stage == plan.stages - 1))
        for stage in stages
    ]
    if cfg.model.tied and len(models) > 1 and models[0].piece.first and models[-1].piece.last:
        models[-1].embed = models[0].embed
    return models


def _maker(cfg: Config, device: torch.device, tensor: TensorGroup | None = None) -> Callable[..., Transformer]:
    """Makes the model, or a `piece` of it. Raises KernelUnavailable."""
    dtype = DTYPES[cfg.run.dtype]
    ops = kernels.choose(device.type, cfg.kernels, dtype)
    return partial(
        Transformer, cfg.model, ops, dtype=dtype, device=device, tensor=tensor, recompute=recompute_of(cfg.layout)
    )


def recompute_of(layout: Layout) -> Recompute:
    names = layout.recompute
    blocks = (layout.recompute_layers or sys.maxsize) if "block" in names else 0
    return Recompute("norm" in names, "activation" in names, blocks, layout.recompute_group)


def parameters(models: Sequence[Transformer]) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of all pieces in model order, each once."""
    seen: set[int] = set()
    for model in models:
        for name, parameter in model.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def share_of(name: str, cfg: Config, groups: Groups) -> Share:
    """Who else in this replica of the model has parameter `name` or part of it, and who counts it."""
    tp, kv, ends = groups.tp, groups.kv, groups.embedding
    if name == "embed.weight" and ends is not None:
        return Share(ends, ends.index == 0, holders=buffers.SHARED_BY_ENDS)
    if short(name).startswith("attn.qkv.") and kv.size > 1:
        model = local(cfg.model, tp.size)
        rows = model.heads * model.head_dim
        shared = ((rows, rows + 2 * model.kv_heads * model.head_dim),)
        return Share(kv, kv.index == 0, shared, buffers.SHARED_BY_KV)
    if tp.size == 1 or is_cut(name):
        return NOT_SHARED
    if needs_sum(name, cfg.layout.sequence_parallel):
        return Share(tp, tp.index == 0, holders=buffers.WHOLE)
    return Share(None, tp.index == 0, holders=buffers.COPIED)


def stream_shape(cfg: Config, groups: Groups) -> tuple[int, ...]:
    """What one stage hands to the next."""
    batch, hidden = cfg.batch, cfg.model.hidden
    if groups.tp.size > 1 and cfg.layout.sequence_parallel:
        return batch.micro * batch.seq_length // groups.tp.size, hidden
    return batch.micro, batch.seq_length, hidden


class Feed:
    """The micro-batches of a step, what every backward begins with, and the sum of losses so far."""

    def __init__(
        self, vocab: int, device: torch.device, loss_scale: LossScale | None, fixed: FixedInputs | None = None
    ) -> None:
        """`fixed`: keeps shapes, and perhaps addresses, from step to step."""
        self.vocab, self.device, self.loss_scale, self.fixed = vocab, device, loss_scale, fixed
        self.micro_batches: tuple[MicroBatch, ...] = ()
        self.held: list[Inputs] = []
        self.total = torch.zeros((), device=device)
        self.stop = torch.zeros((), device=device)
        self.kept = 0
        """Most bytes that lay in the memory of a CUDA device at the end of a last stage's forward."""
        self.per_token = torch.ones((), device=device)
        # In fp16 the scale goes into the logits' gradient before that is rounded.
        self.upstream = self.per_token if loss_scale is None else torch.ones((), device=device)

    def take(self, batch: GlobalBatch, valid_tokens: Tensor | float, stop: bool = False) -> None:
        """The next step's micro-batches, in which all replicas together have so many tokens with a loss, and whether
        this rank has been asked to stop.

        Raises DataError for a token outside the vocabulary.
        """
        check_tokens(batch, self.vocab)
        self.micro_batches = batch.micro_batches
        self.held = [] if self.fixed is None else self.fixed.take(batch.micro_batches)
        if isinstance(valid_tokens, Tensor):
            torch.reciprocal(valid_tokens.clamp(min=1), out=self.per_token)
        else:
            self.per_token.fill_(1.0 / max(valid_tokens, 1))
        if self.loss_scale is not None:
            torch.mul(self.per_token, self.loss_scale.scale, out=self.upstream)
        self.total.zero_()
        self.stop.fill_(float(stop))

    def inputs(self, micro_batch: int) -> Inputs:
        """A micro-batch of the step on the device."""
        if self.held:
            return self.held[micro_batch]
        return Inputs.of(self.micro_batches[micro_batch]).to(self.device)


class Stage:
    """The chunk of a pipeline that one piece of the model is (megapre.parallel.pipeline.SplitChunk)."""

    def __init__(self, model: Transformer, feed: Feed, flat: FlatParameters, compiled: bool) -> None:
        self.run: Callable[..., Tensor] = torch.compile(model.run, dynamic=False) if compiled else model.run
        self.feed, self.flat, self.last = feed, flat, model.piece.last
        self.kept: dict[int, tuple[Tensor | None, GradientEdge]] = {}
        self.postponed: dict[int, list[Callable[[], None]]] = {}

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        feed, trained = self.feed, torch.is_grad_enabled()
        leaf = x if x is None or not trained else x.detach().requires_grad_()
        out = self.run(leaf, *feed.inputs(micro_batch), feed.upstream)
        if self.last:
            feed.total += out.detach() * feed.per_token if trained else out
        if trained:
            self.kept[micro_batch] = leaf, get_gradient_edge(out)
            if self.last and feed.device.type == "cuda":
                feed.kept = max(feed.kept, torch.cuda.memory_allocated(feed.device))
        return out

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        leaf, edge = self.kept.pop(micro_batch)
        torch.autograd.backward((edge,), (self.feed.upstream if grad is None else grad,))
        return None if leaf is None else leaf.grad

    def backward_input(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        self.flat.postponed = self.postponed[micro_batch] = []
        try:
            return self.backward(micro_batch, grad)
        finally:
            self.flat.postponed = None

    def backward_weights(self, micro_batch: int) -> None:
        with torch.no_grad():
            for write in self.postponed.pop(micro_batch):
                write()


def check_tokens(batch: GlobalBatch, vocab: int) -> None:
    """Raises DataError for a token outside the vocabulary, which a device would answer with a crash or worse."""
    for part in batch.micro_batches:
        outside = (part.tokens < 0) | (part.tokens >= vocab)
        if outside.any():
            raise DataError(
                f"the data holds token {int(part.tokens[outside][0])}, the model knows 0 .. {vocab - 1}: the data is "
                f"damaged, or made with another tokenizer, or model.vocab = {vocab} is too small for it"
            )
