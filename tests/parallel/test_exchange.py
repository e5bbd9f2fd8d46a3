"""Replicas that see different data train as one that sees all of it, with sharded states or without."""

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn
from torch import Tensor, nn

from megapre import kernels
from megapre.config import Optim
from megapre.model import decays
from megapre.optim.adamw import AdamW
from megapre.parallel.comm import Group
from megapre.parallel.data import ALONE, FlatParameters

STEPS, MICRO_BATCHES = 3, 2
OPTIM = Optim(lr=1e-2)


class Net(nn.Module):
    """A matrix used twice, layers, and a parameter that some steps do not use."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 70, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(70, 70, dtype=dtype) for _ in range(3))
        self.sometimes = nn.Parameter(torch.ones(70, dtype=dtype))

    def forward(self, tokens: Tensor, use: bool) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        x = x * self.sometimes if use else x
        return (x @ self.embed.weight.T).float().square().mean()


def batches(step: int, replicas: int) -> list[list[Tensor]]:
    """Micro-batches by replica."""
    generator = torch.Generator().manual_seed(step)
    return [
        [torch.randint(11, (8,), generator=generator) for _ in range(MICRO_BATCHES)]
        for _ in range(4 // replicas * replicas)
    ]


def train(
    dtype: torch.dtype, mine: slice, replicas: Group, sharded: bool
) -> tuple[dict[str, Tensor], list[float], int]:
    """Parameters and gradient norms of STEPS steps, and how many sums had begun when the last backward was over."""
    net = Net(dtype)
    flat = FlatParameters(net.named_parameters(), decays, 3000, replicas=replicas, sharded=sharded)
    ops = kernels.choose("cpu")
    optimizer = AdamW(flat.groups, OPTIM, ops.adamw_)
    norms, early = [], 0
    for step in range(STEPS):
        flat.begin_step()
        if flat.exchange is not None:
            flat.exchange.ready("embed")
            flat.exchange.ready()
        for part in batches(step, 4)[mine]:
            for tokens in part:
                net(tokens, use=step != 1).backward()
        early = 0 if flat.exchange is None else flat.exchange.begun
        flat.finish_step()
        counted = flat.counted()
        norm = ops.grad_norm(counted) if counted else torch.zeros(())
        if replicas.size > 1:
            square = norm.square()
            dist.all_reduce(square, group=replicas.handle)
            norm = square.sqrt()
        norms.append(norm.item())
        optimizer.step(OPTIM.lr, None, torch.zeros(()))
        if flat.exchange is not None:
            flat.exchange.gather()
    if flat.exchange is not None:
        flat.exchange.ready()
    return {name: value.detach().clone() for name, value in net.named_parameters()}, norms, early


def replica(dtype: torch.dtype, sharded: bool) -> tuple[dict[str, Tensor], list[float], int]:
    rank, size = dist.get_rank(), dist.get_world_size()
    share = 4 // size
    group = Group(tuple(range(size)), rank, dist.group.WORLD)
    return train(dtype, slice(rank * share, (rank + 1) * share), group, sharded)


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_replicas_train_as_one(run_on: RunOn, size: int, dtype: torch.dtype, sharded: bool) -> None:
    """Gradients of eight micro-batches are added in another order. Those of bf16 have 8 bits, which fp32 adds exactly:
    nothing may differ. In fp32 a sum is off by up to 8 * 2^-24 of its largest term; where terms cancel to a sixteenth
    of that, AdamW makes of it 2^-17 of a step of at most lr, and the parameter is rounded anew.
    """
    rtol, atol = (0, 0) if dtype is torch.bfloat16 else (2**-22, STEPS * OPTIM.lr * 2**-17)
    expected, norms, _ = train(dtype, slice(0, 4), ALONE, sharded)
    for found, found_norms, early in run_on(size, replica, dtype, sharded):
        assert found_norms == pytest.approx(norms, rel=2**-22)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)
        assert early >= 3, "sums must begin while the backward runs"


def use_more_often_than_at_first() -> str:
    group = Group((0, 1), dist.get_rank(), dist.group.WORLD)
    net = Net(torch.float32)
    flat = FlatParameters(net.named_parameters(), decays, 3000, replicas=group)
    message = ""
    for times in (1, 2):
        flat.begin_step()
        try:
            for _ in range(times):
                net(torch.arange(8), use=True).backward()
        except RuntimeError as error:
            message = str(error)
        flat.finish_step()
    return message


def test_a_gradient_after_its_sum_is_an_error(run_on: RunOn) -> None:
    for message in run_on(2, use_more_often_than_at_first):
        assert "was written 2 times in this step and 1 times in the first" in message
