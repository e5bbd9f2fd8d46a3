"""Liger's own kernels in the interpreter, where the package is there and they run in it: its norms do not."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from interpreted import INTERPRETED
from rule import twice
from torch import Tensor

from megapre.kernels import rope, swiglu
from megapre.kernels.third_party import liger

pytest.importorskip("liger_kernel")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the tests of every row run it")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@pytest.fixture(autouse=True)
def without_libdevice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cannot call the device's own library of functions."""
    monkeypatch.setattr("liger_kernel.ops.geglu.tanh", tanh)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("row", "own"), [(liger.swiglu, swiglu.composed_torch), (liger.geglu, swiglu.geglu_composed_torch)]
)
def test_gated(row: Callable[[Tensor], Tensor], own: Callable[[Tensor], Tensor], rows: int) -> None:
    x = random(2, rows, 74)
    before = x.clone()
    twice(row, own, [x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("documents", [False, True])
def test_rope(documents: bool) -> None:
    angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    cu_seqlens = torch.tensor([0, 4, 7, 12], dtype=torch.int32) if documents else None
    q, k = random(2, 6, 4, 8), random(2, 6, 2, 8)
    before = q.clone(), k.clone()
    twice(
        lambda q, k: liger.rope(q, k, angles.cos(), angles.sin(), cu_seqlens=cu_seqlens),
        lambda q, k: rope.reference(q, k, angles.cos(), angles.sin(), cu_seqlens=cu_seqlens),
        [q, k],
    )
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
