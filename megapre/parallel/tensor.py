"""Layers cut over the ranks of a tensor-parallel group, and the collectives between them.

    column   y_r = x W_r^T + b_r      rows of W cut, so columns of y; x whole on every rank
    row      y = sum_r x_r W_r^T + b  columns of W cut, so columns of x
    vocab    rows of a table cut; a rank looks up the ids it has, the sum over ranks is the lookup

A column layer followed by a row layer needs one sum over ranks forward and one backward (Shoeybi et al. 2019,
arXiv:1909.08053). With `sequence` the residual stream between such pairs is cut over the tokens: [T / size, H] on each
rank instead of [T, H] on all. Then a column layer gathers its input, a row layer's sum leaves each rank its own tokens,
and what stands between, norms and additions, is done once instead of `size` times (Korthikanti et al. 2022,
arXiv:2205.05198); the bytes communicated are the same.

                     forward                             backward
    column           all-gather x       (or nothing)     reduce-scatter dx   (or all-reduce)
    row              reduce-scatter y   (or all-reduce)  all-gather dy       (or nothing)

The backward of a column layer starts its collectives and multiplies meanwhile: x is gathered again (it is kept cut)
during dx = dy W, and dx is summed during dW = dy^T x. With `ring` also the collectives that a product has to wait for
are cut into `size` exchanges with the neighbours, each beside the product of the piece before (Wang et al. 2023,
"Overlap communication with dependent computation via decomposition", section 3).

With tensor None a layer is what it is without ranks. Tokens are the rows of [T, H], or of any [..., H] flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapre.kernels.linear import Products, products

from .comm import all_gather, reduce_scatter

if TYPE_CHECKING:
    from megapre.kernels import Kernels


class Arriving(NamedTuple):
    """The result of a collective under way."""

    result: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.result


@dataclass(frozen=True)
class TensorGroup:
    """The tensor-parallel group that this process is in: of `size` >= 2 ranks, of which it is number `rank`."""

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence: bool = False
    ring: bool = False

    def own(self, rows: Tensor) -> Tensor:
        """This rank's share of a stream [T, ...] that is cut over the tokens; the stream itself where it is not."""
        return rows.chunk(self.size)[self.rank] if self.sequence else rows

    def gather(self, own: Tensor) -> Arriving:
        """[T / size, H] of each rank -> [T, H], when the work is done."""
        whole = own.new_empty(self.size * own.shape[0], *own.shape[1:])
        return Arriving(whole, all_gather(whole, own.contiguous(), group=self.group, async_op=True))

    def gather_statistics(self, own: Tensor) -> Arriving:
        """[T, K] of each rank -> [size, T, K], which `wait()` of the result returns."""
        whole, work = self.gather(own)
        return Arriving(whole.view(self.size, *own.shape), work)

    def sum(self, partial: Tensor) -> Arriving:
        """The sum over ranks of [T, H], when the work is done: this rank's tokens with `sequence`, else all."""
        if not self.sequence:
            return Arriving(partial, dist.all_reduce(partial, group=self.group, async_op=True))
        own = partial.new_empty(partial.shape[0] // self.size, *partial.shape[1:])
        return Arriving(own, reduce_scatter(own, partial.contiguous(), group=self.group, async_op=True))


class _Linear(nn.Linear):
    """nn.Linear with this rank's `ins` and `outs`, left uninitialised: who makes it draws the weights."""

    def __init__(
        self, ins: int, outs: int, bias: bool, ops: Kernels, like: dict[str, Any], tensor: TensorGroup | None = None
    ) -> None:
        super().__init__(ins, outs, bias, **like)
        self.ops, self.tensor = ops, tensor
        self.products = products(ops.linear)

    def reset_parameters(self) -> None:
        pass


class ColumnLinear(_Linear):
    """Some of the outputs are on this rank."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., ins] -> [..., outs]; with `sequence` [T / size, ins] -> [T, outs]."""
        if self.tensor is None:
            return self.ops.linear(x, self.weight, self.bias)  # type: ignore[no-any-return]
        return _Column.apply(x, self.weight, self.bias, self.tensor, self.products)  # type: ignore[no-any-return]


class RowLinear(_Linear):
    """Some of the inputs are on this rank. The bias is whole on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., ins] -> [..., outs]; with `sequence` [T, ins] -> [T / size, outs]."""
        if self.tensor is None:
            return self.ops.linear(x, self.weight, self.bias)  # type: ignore[no-any-return]
        y = _Row.apply(x, self.weight, self.tensor, self.products)
        return y if self.bias is None else y + self.bias


class VocabEmbedding(nn.Embedding):
    """nn.Embedding with `rows` of its rows on this rank, from row rank * rows on, left uninitialised."""

    def __init__(
        self, rows: int, width: int, ops: Kernels, like: dict[str, Any], tensor: TensorGroup | None = None
    ) -> None:
        super().__init__(rows, width, **like)
        self.ops, self.tensor = ops, tensor

    def reset_parameters(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ids below the rows of all ranks, [...] -> [..., width]; [B, S] -> [T / size, width] with `sequence`."""
        if self.tensor is None:
            return self.ops.embedding(ids, self.weight)  # type: ignore[no-any-return]
        rows = self.num_embeddings
        partial = self.ops.embedding(ids, self.weight, self.tensor.rank * rows, self.tensor.size * rows)
        return leave(partial.flatten(0, 1) if self.tensor.sequence else partial, self.tensor)


def enter(x: Tensor, tensor: TensorGroup | None) -> Tensor:
    """What a column layer does with its input, by itself: whole tokens on every rank, and dx summed on the way back."""
    return x if tensor is None else _Enter.apply(x, tensor)


def leave(partial: Tensor, tensor: TensorGroup | None) -> Tensor:
    """What a row layer does with its output, by itself: the sum over ranks, of this rank's tokens with `sequence`."""
    return partial if tensor is None else _Leave.apply(partial, tensor)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return tensor.gather(x).wait() if tensor.sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.tensor.sum(dy if ctx.tensor.sequence else dy.clone()).wait(), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return tensor.sum(partial if tensor.sequence else partial.clone()).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.tensor.gather(dy).wait() if ctx.tensor.sequence else dy, None


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tensor: TensorGroup, ops: Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.tensor, ctx.ops = weight, bias, tensor, ops  # the parameters, for their sinks
        if not tensor.sequence:
            return ops.product(x, weight, bias)
        if tensor.ring:
            return gathered_product(x, weight, bias, tensor, ops.product)
        return ops.product(tensor.gather(x).wait(), weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tensor: TensorGroup = ctx.tensor
        gathering = tensor.gather(x) if tensor.sequence else None
        partial = ctx.ops.input_gradient(dy, weight)
        whole = x if gathering is None else gathering.wait()
        summing = tensor.sum(partial)
        gradients = ctx.ops.weight_gradients(dy, whole, ctx.weight, ctx.bias)
        return summing.wait(), *gradients, None, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tensor: TensorGroup, ops: Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.tensor, ctx.ops = weight, tensor, ops
        if tensor.sequence and tensor.ring:
            return product_scattered(x, weight, tensor, ops.product)
        return tensor.sum(ops.product(x, weight)).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tensor: TensorGroup = ctx.tensor
        whole = tensor.gather(dy).wait() if tensor.sequence else dy
        dx = ctx.ops.input_gradient(whole, weight) if ctx.needs_input_grad[0] else None
        dweight, _ = ctx.ops.weight_gradients(whole, x, ctx.weight)
        return dx, dweight, None, None


def gathered_product(
    own: Tensor, weight: Tensor, bias: Tensor | None, tensor: TensorGroup, product: Callable[..., Tensor]
) -> Tensor:
    """The product of the gathered tokens, [T, outs], as a ring: while tokens are multiplied, the next arrive."""
    y = own.new_empty(tensor.size, own.shape[0], weight.shape[0])
    piece = own.contiguous()
    for step in range(tensor.size):
        arriving = _pass_on(piece, tensor) if step + 1 < tensor.size else None
        y[(tensor.rank - step) % tensor.size] = product(piece, weight, bias)
        if arriving is not None:
            piece = arriving.wait()
    return y.flatten(0, 1)


def product_scattered(x: Tensor, weight: Tensor, tensor: TensorGroup, product: Callable[..., Tensor]) -> Tensor:
    """The product x W^T summed over ranks, of this rank's tokens, [T / size, outs], as a ring: while one share is
    multiplied, the sum of the share before travels. A sum begins with the rank after the one that keeps it.
    """
    shares = x.chunk(tensor.size)
    total = product(shares[(tensor.rank - 1) % tensor.size], weight)
    for step in range(1, tensor.size):
        arriving = _pass_on(total, tensor)
        part = product(shares[(tensor.rank - 1 - step) % tensor.size], weight)
        total = arriving.wait().add_(part)
    return total


def _pass_on(piece: Tensor, tensor: TensorGroup) -> _Exchange:
    """Sends `piece` to the next rank of the ring; what the rank before sends arrives."""
    arriving = torch.empty_like(piece)
    after, before = (tensor.rank + 1) % tensor.size, (tensor.rank - 1) % tensor.size
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, piece, group=tensor.group, group_peer=after),
            dist.P2POp(dist.irecv, arriving, group=tensor.group, group_peer=before),
        ]
    )
    return _Exchange(arriving, works)


class _Exchange(NamedTuple):
    result: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.result
