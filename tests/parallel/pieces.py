"""Pieces of a small network as chunks of a pipeline, and what the whole network gives."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

WIDTH = 6
SHAPE = (4, WIDTH)


def network(layers: int) -> list[nn.Module]:
    """Layers in float64, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    made = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(layers)]
    with torch.no_grad():
        for layer in made:
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    return list(made)


def micro_batches(m: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(m)]


def cut(layers: list[nn.Module], stages: int) -> list[nn.Sequential]:
    """Into stages of one and two layers in turn, as far as they go; the last one gets the rest."""
    sizes = [1 + stage % 2 for stage in range(stages - 1)]
    sizes.append(len(layers) - sum(sizes))
    assert sizes[-1] > 0, f"{len(layers)} layers are too few for {stages} stages"
    rest = iter(layers)
    return [nn.Sequential(*(next(rest) for _ in range(size))) for size in sizes]


def whole_gradients(layers: int, m: int) -> list[list[Tensor]]:
    """Of each layer's parameters, by accumulation over the micro-batches in order; their loss is a sum of squares."""
    made = network(layers)
    whole = nn.Sequential(*made)
    for x in micro_batches(m):
        whole(x).square().sum().backward()
    return [[p.grad for p in layer.parameters() if p.grad is not None] for layer in made]


class Piece:
    """A piece of a network as a chunk; the last one turns its output into a loss, and adds up the losses."""

    def __init__(self, net: nn.Module, data: list[Tensor] | None, last: bool) -> None:
        self.net, self.data, self.last = net, data, last
        self.saved: dict[int, tuple[Tensor | None, object]] = {}
        self.grads: dict[int, Tensor | None] = {}
        self.in_flight = 0
        self.total = torch.zeros((), dtype=torch.float64)

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        leaf = None
        if x is None:
            assert self.data is not None
            x = self.data[micro_batch]
        elif torch.is_grad_enabled():
            leaf = x = x.detach().requires_grad_()
        y = self.net(x)
        if self.last:
            y = y.square().sum()
            self.total += y.detach()
        if torch.is_grad_enabled():
            self.saved[micro_batch] = leaf, y if self.last else get_gradient_edge(y)
            self.in_flight = max(self.in_flight, len(self.saved))
        return y

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        leaf, output = self.saved.pop(micro_batch)
        torch.autograd.backward(output, grad)
        return None if leaf is None else leaf.grad

    def backward_input(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        leaf, output = self.saved[micro_batch]
        self.grads[micro_batch] = grad
        if leaf is None:
            return None
        return torch.autograd.grad(output, leaf, grad, retain_graph=True)[0]

    def backward_weights(self, micro_batch: int) -> None:
        _, output = self.saved.pop(micro_batch)
        weights = list(self.net.parameters())
        for p, of_p in zip(
            weights,
            torch.autograd.grad(output, weights, self.grads.pop(micro_batch)),
            strict=True,
        ):
            p.grad = of_p if p.grad is None else p.grad + of_p
