"""Our CUDA and Triton kernels in a CUDA graph, forward, backward and update: a replay gives the bits of a call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rule import same
from test_registered_ops import calls
from torch import Tensor
from updated import HYPER

from megapre import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
OURS = ("triton", "cuda")


def ours(op: str) -> list[Callable[..., Any]]:
    rows = [row for row in kernels.table("cuda") if row.op == op and row.available and row.implementation in OURS]
    return [getattr(kernels.choose("cuda", {op: row.implementation}), op) for row in rows]


def replayed(work: Callable[..., Sequence[Tensor]], recorded: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    """What a graph of `work`, captured over `recorded`, gives when these hold `wanted`."""
    held = [t.detach().clone().requires_grad_(t.requires_grad) for t in recorded]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes workspaces, outside of the graph
        work(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a backward runs in a thread of its own
        results = work(*held)
    with torch.no_grad():
        for t, value in zip(held, wanted, strict=True):
            t.copy_(value)
    graph.replay()
    return [result.clone() for result in results]


def with_gradients(made: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
    out = made(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    return [*(o.detach() for o in outputs), *gradients]


@pytest.mark.parametrize("op_name", calls("cpu"))
def test_forward_and_backward(op_name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for op in ours(op_name):
        for call, shapes in calls("cuda")[op_name]:
            if op_name == "attention":
                shapes = [(*shape[:3], 8) for shape in shapes]  # the least head dim of the CUDA kernels
            work = functools.partial(with_gradients, call(op))
            first, second = (
                [torch.randn(shape, generator=generator).cuda().bfloat16().requires_grad_() for shape in shapes]
                for _ in range(2)
            )
            expected = work(*(t.detach().clone().requires_grad_() for t in second))
            assert same(replayed(work, first, second), expected)


@pytest.mark.parametrize("op_name", ["adamw_", "adamw_stochastic_", "grad_norm"])
def test_updates(op_name: str) -> None:
    """With lr, step, the scale and the flag of overflow changed in the device's memory."""
    for op in ours(op_name):

        def work(state: Tensor, grad: Tensor, *scalars: Tensor, op: Callable[..., Any] = op) -> list[Tensor]:
            if op_name == "grad_norm":
                return [op([grad, state])]
            moments = [torch.zeros_like(state), torch.ones_like(state)]
            names = ("lr", "step", "grad_scale", "found_inf")
            told = {**dict(zip(names, scalars, strict=True)), **HYPER}
            if op_name == "adamw_":
                op(state, state, *moments, grad, **told)
            else:
                op(state, *moments, grad, seed=5, **told)
            return [state, *moments]

        dtype = torch.bfloat16 if op_name == "adamw_stochastic_" else torch.float32
        draws = torch.randn(2, 2, 5003, generator=torch.Generator().manual_seed(3)).cuda()
        for found in (0.0, 1.0):
            first, second = (
                [state.to(dtype), grad, *(torch.tensor(value).cuda() for value in scalars)]
                for (state, grad), scalars in zip(draws, ((1e-2, 1.0, 1.0, 0.0), (1e-3, 4.0, 0.5, found)), strict=True)
            )
            expected = [t.clone() for t in work(*(t.clone() for t in second))]
            assert same(replayed(work, first, second), expected)
