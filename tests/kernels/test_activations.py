"""gelu, swiglu and geglu against torch's own, by the 2x rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import alike, run, twice
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels

DTYPES = [torch.float32, torch.bfloat16]
GATED = {
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "geglu": lambda x: F.gelu(x.chunk(2, -1)[0], approximate="tanh") * x.chunk(2, -1)[1],
}


def values(rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1009 + width)
    return (torch.randn(rows, width, generator=generator) * 3).to(device, dtype)


@pytest.mark.op("gelu")
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(0, 7), width=st.integers(1, 130), bias=st.booleans(), approximate=st.sampled_from(["tanh", "none"])
)
def test_gelu_obeys_the_rule(
    device: str, implementation: str, dtype: torch.dtype, rows: int, width: int, bias: bool, approximate: str
) -> None:
    op = kernels.choose(device, {"gelu": implementation}).gelu
    tensors = [values(rows, width, dtype, device), *([values(1, width, dtype, device)[0]] if bias else [])]
    twice(
        lambda x, *b: op(x, *b, approximate=approximate),
        lambda x, *b: F.gelu(x + b[0] if b else x, approximate=approximate),
        tensors,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_name", ["swiglu", "geglu"])
@given(rows=st.integers(0, 7), width=st.integers(1, 130))
def test_gated_activations_obey_the_rule(device: str, op_name: str, dtype: torch.dtype, rows: int, width: int) -> None:
    for row in kernels.table(device):
        if row.op == op_name and row.available:
            op = getattr(kernels.choose(device, {op_name: row.implementation}), op_name)
            twice(op, GATED[op_name], [values(rows, 2 * width, dtype, device)])


@pytest.mark.parametrize("op_name", ["gelu", "swiglu", "geglu"])
def test_activations_of_extreme_and_strided_input(device: str, op_name: str) -> None:
    for row in kernels.table(device):
        if row.op != op_name or not row.available:
            continue
        op = getattr(kernels.choose(device, {op_name: row.implementation}), op_name)
        extreme = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4] * 2], device=device)
        outputs, gradients = run(op, [extreme])
        assert torch.isfinite(outputs[0]).all() and torch.isfinite(gradients[0]).all()
        base = torch.randn(6, 8, 20, device=device)
        strided, packed = run(op, [base.transpose(0, 2)[::2]]), run(op, [base.transpose(0, 2)[::2].contiguous()])
        alike(strided[0] + strided[1], packed[0] + packed[1])


def test_impossible_requests_are_named(device: str) -> None:
    ops = kernels.choose(device)
    for name in ("swiglu", "geglu"):
        with pytest.raises(ValueError, match="last dim is 7"):
            getattr(ops, name)(torch.zeros(2, 7, device=device))
    for row in kernels.table(device):
        if row.op == "gelu" and row.available:
            with pytest.raises(ValueError, match="approximate is 'erf'"):
                kernels.choose(device, {"gelu": row.implementation}).gelu(torch.zeros(2), approximate="erf")
