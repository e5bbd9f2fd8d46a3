"""Pieces of a training step that communicate, to be timed under different settings, and a checksum of what they give.

Exchange   a backward that makes one weight gradient after the other, and the buckets that follow: summed beside the
           products, handed round after the update; the code is that of a step (`FlatParameters`)
LayerPair  a column and a row layer, forward: tokens gathered, multiplied, multiplied, summed

The numbers in them are small and whole. No sum is ever rounded, in whatever order it is made and in whatever dtype, so
that two settings must agree bit for bit; they are sparse, which products do not notice (but for a GPU's power).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from megapre.config import Config
from megapre.plan import count

from .comm import Group
from .data import FlatParameters
from .tensor import ColumnLinear, RowLinear, TensorGroup

if TYPE_CHECKING:
    from megapre.kernels import Kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Trial(Protocol):
    """Something to time: `()` does it once. `checksum()` does it once on cleared buffers and digests what comes out."""

    def __call__(self) -> None: ...
    def checksum(self) -> str: ...


@dataclass(frozen=True)
class Sizes:
    """Of what one rank works on: `matrices` weights of [hidden, hidden] and a feed-forward layer of `ffn` features."""

    tokens: int
    hidden: int
    ffn: int
    matrices: int
    dtype: torch.dtype
    grad_dtype: torch.dtype

    @classmethod
    def of(cls, cfg: Config) -> Sizes:
        """As much as a rank of `cfg` has: its parameters as square matrices, one micro-batch of tokens."""
        layout, model = cfg.layout, cfg.model
        parameters = sum(count(model)) // (layout.tp * layout.pp)
        return cls(
            cfg.batch.micro * cfg.batch.seq_length // layout.cp,
            model.hidden,
            max(model.ffn // layout.tp, 1),
            max(parameters // model.hidden**2, 1),
            DTYPES[cfg.run.dtype],
            DTYPES[cfg.optim.grad_dtype],
        )

    @property
    def elements(self) -> int:
        return self.matrices * self.hidden**2

    @property
    def bytes(self) -> int:
        """Of the weights and gradients of one Exchange."""
        return self.elements * (self.dtype.itemsize + self.grad_dtype.itemsize)

    def within(self, room: float) -> Sizes:
        """As many of the matrices as one Exchange may have in `room` bytes; one at least."""
        return replace(self, matrices=max(min(self.matrices, int(room * self.matrices / self.bytes)), 1))


class Exchange:
    """Gradients of all matrices, exchanged between `replicas` in buckets of `bucket` elements or a little more."""

    def __init__(self, sizes: Sizes, replicas: Group, bucket: int, sharded: bool, device: torch.device) -> None:
        square = sizes.hidden, sizes.hidden
        self.weights = [
            (str(n), nn.Parameter(torch.zeros(square, dtype=sizes.dtype, device=device))) for n in range(sizes.matrices)
        ]
        self.flat = FlatParameters(
            self.weights,
            lambda name, parameter: True,
            bucket,
            False,
            sizes.grad_dtype,
            replicas=replicas,
            sharded=sharded,
        )
        # Matrix n takes tokens n, n + 1, ...; of their output gradients only the first is not 0, so its gradient is the
        # outer product of two rows: -1, 0 and 1, another one for each matrix and rank.
        self.tokens = _signs(sizes.tokens + sizes.matrices, sizes.hidden, 0, device).to(sizes.dtype)
        self.dy = torch.zeros(sizes.tokens, sizes.hidden, dtype=sizes.dtype, device=device)
        self.dy[0] = _signs(1, sizes.hidden, replicas.index, device)[0].to(sizes.dtype)
        self()  # the first step finds out when a bucket is full

    def __call__(self) -> None:
        flat = self.flat
        flat.begin_step()
        for name, weight in reversed(self.weights):
            sink = weight.gradient_sink  # type: ignore[attr-defined]
            total, _ = sink()
            total.copy_(self.dy.T @ self.tokens[int(name) : int(name) + len(self.dy)])
            sink.written()
        flat.finish_step()
        for group in flat.groups:
            for piece in group.pieces():
                piece.param.copy_(piece.grad)  # in place of the update
        if flat.exchange is not None:
            flat.exchange.gather()
            flat.exchange.ready()

    def checksum(self) -> str:
        for group in self.flat.groups:
            group.param.fill_(7)
            group.grad.fill_(7)
        self()
        views = self.flat.named(lambda group: group.param)
        return _digest(views[name] for name, _ in self.weights)


class LayerPair:
    """[T, hidden] -> [T, ffn of all ranks] -> [T, hidden], cut over the ranks of `tensor`."""

    def __init__(self, sizes: Sizes, tensor: TensorGroup, ops: Kernels, device: torch.device) -> None:
        self.tensor = tensor
        like = {"dtype": sizes.dtype, "device": device}
        tokens = max(sizes.tokens // tensor.size, 1) * tensor.size
        self.x = tensor.own(_signs(tokens, sizes.hidden, 0, device).to(sizes.dtype))
        self.up = ColumnLinear(sizes.hidden, sizes.ffn, False, ops, like, tensor)
        self.down = RowLinear(sizes.ffn, sizes.hidden, False, ops, like, tensor)
        for weight, step in ((self.up.weight, 5), (self.down.weight, 3)):
            rows = torch.arange(len(weight), device=device)
            weight.detach().zero_()[rows, (rows * step + tensor.rank) % weight.shape[1]] = 1  # one number in each row
        self.result = self.x

    @torch.no_grad()
    def __call__(self) -> None:
        self.result = self.down(self.up(self.x))

    def checksum(self) -> str:
        self.result = torch.empty(0)
        self()
        return _digest([self.result])


def _signs(rows: int, columns: int, shift: int, device: torch.device) -> Tensor:
    """[rows, columns] of -1, 0 and 1 in a pattern without a short period, another one for each `shift`."""
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    return ((row * 7919 + column * 104729 + shift * 1299709 + row * column) % 1009 % 3 - 1).float()


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
