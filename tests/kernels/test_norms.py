"""layer_norm and rms_norm against torch's own, by the 2x rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import alike, run, same, twice
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = st.integers(1, 200) | st.sampled_from([256, 768, 1000, 1024])


def inputs(rows: int, width: int, dtype: torch.dtype, device: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 1009 + width)
    shapes = [(rows, width), (width,), (width,), (rows, width)][:count]
    return [(torch.randn(s, generator=generator) * 2 + 0.5).to(device, dtype) for s in shapes]


@pytest.mark.op("layer_norm")
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 9), width=WIDTHS, affine=st.booleans(), residual=st.booleans())
def test_layer_norm_obeys_the_rule(
    device: str, implementation: str, dtype: torch.dtype, rows: int, width: int, affine: bool, residual: bool
) -> None:
    op = kernels.choose(device, {"layer_norm": implementation}).layer_norm
    x, weight, bias, extra = inputs(rows, width, dtype, device, 4)
    tensors = [x, weight, *([bias] if affine else []), *([extra] if residual else [])]

    def actual(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return op(x, w, rest[0] if affine else None, 1e-5, rest[-1] if residual else None)

    def own(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = x + rest[-1] if residual else x
        y = F.layer_norm(h, (width,), w, rest[0] if affine else None, 1e-5)
        return (y, h) if residual else y

    twice(actual, own, tensors)


@pytest.mark.op("rms_norm")
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 9), width=WIDTHS, residual=st.booleans())
def test_rms_norm_obeys_the_rule(
    device: str, implementation: str, dtype: torch.dtype, rows: int, width: int, residual: bool
) -> None:
    op = kernels.choose(device, {"rms_norm": implementation}).rms_norm
    x, weight, _, extra = inputs(rows, width, dtype, device, 4)

    def actual(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return op(x, w, 1e-6, *rest)

    def own(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = x + rest[0] if residual else x
        y = F.rms_norm(h, (width,), w, 1e-6)
        return (y, h) if residual else y

    twice(actual, own, [x, weight, *([extra] if residual else [])])


@pytest.mark.op("layer_norm")
def test_layer_norm_gradients_through_one_output_only(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"layer_norm": implementation}).layer_norm
    x, weight, bias, residual = inputs(5, 33, torch.float32, device, 4)
    for at in (0, 1):
        twice(
            lambda x, w, b, r, at=at: op(x, w, b, 1e-5, r)[at] + 0 * (w * b).sum(),
            lambda x, w, b, r, at=at: (F.layer_norm(x + r, (33,), w, b, 1e-5), x + r)[at] + 0 * (w * b).sum(),
            [x, weight, bias, residual],
        )


@pytest.mark.op("rms_norm")
def test_rms_norm_gradients_through_one_output_only(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"rms_norm": implementation}).rms_norm
    x, weight, _, residual = inputs(5, 33, torch.float32, device, 4)
    for at in (0, 1):
        twice(
            lambda x, w, r, at=at: op(x, w, 1e-6, r)[at] + 0 * w.sum(),
            lambda x, w, r, at=at: (F.rms_norm(x + r, (33,), w, 1e-6), x + r)[at] + 0 * w.sum(),
            [x, weight, residual],
        )


@pytest.mark.parametrize("op_name", ["layer_norm", "rms_norm"])
def test_norms_of_strided_three_dimensional_and_empty_input(device: str, op_name: str) -> None:
    for row in kernels.table(device):
        if row.op != op_name or not row.available:
            continue
        op = getattr(kernels.choose(device, {op_name: row.implementation}), op_name)
        base = torch.randn(6, 5, 48, device=device)
        weight = torch.randn(48, device=device)
        for x in (base.transpose(0, 1), base[::2, 1:4], base[:, :, ::2], base[:, :0], base[0, 0]):
            w = weight[: x.shape[-1]]
            strided, packed = (
                run(lambda x, w, op=op: op(x, w), [x, w]),
                run(lambda x, w, op=op: op(x, w), [x.contiguous(), w.contiguous()]),
            )
            assert strided[0][0].shape == x.shape
            alike(strided[0] + strided[1], packed[0] + packed[1])


@pytest.mark.parametrize("op_name", ["layer_norm", "rms_norm"])
def test_norms_repeat_bitwise(device: str, op_name: str) -> None:
    for row in kernels.table(device):
        if row.op == op_name and row.available:
            op = getattr(kernels.choose(device, {op_name: row.implementation}), op_name)
            tensors = inputs(513, 257, torch.bfloat16, device, 2)
            first, second = run(op, tensors), run(op, tensors)
            assert same(first[0] + first[1], second[0] + second[1])
