"""The C++ products of a linear layer, one by one: the 2x rule against fp64, layouts, empty, poison, bits, errors."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor

from megapre.kernels import native

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Around and between the tiles: 64 columns, 128 rows, pairs of the sum; beyond 1,024 and 2,048 the sum is cut.
SIZES = st.integers(1, 12) | st.sampled_from([31, 64, 65, 127, 130])
DEEP = st.integers(1, 12) | st.sampled_from([33, 64, 127, 1024, 1025, 2049, 2050])


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.25).to(dtype)


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def products(ops: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """y, dx, dW in its own dtype, the same added to ones, and dW and db added to wide sums of ones."""
    (rows, ins), outs = x.shape, weight.shape[0]
    y, dx, dw = (poisoned(*s, dtype=x.dtype) for s in ((rows, outs), (rows, ins), (outs, ins)))
    ops.linear_(y, x, weight, bias)
    ops.linear_input_gradient_(dx, dy, weight)
    ops.linear_weight_gradient_(dw, None, dy, x, False)
    added = torch.ones(outs, ins, dtype=x.dtype)
    ops.linear_weight_gradient_(added, None, dy, x, True)
    total, sums = torch.ones(outs, ins, dtype=acc(x.dtype)), torch.ones(outs, dtype=acc(x.dtype))
    ops.linear_weight_gradient_(total, sums, dy, x, True)
    over, over_sums = poisoned(outs, ins, dtype=acc(x.dtype)), poisoned(outs, dtype=acc(x.dtype))
    ops.linear_weight_gradient_(over, over_sums, dy, x, False)
    torch.testing.assert_close(over + 1, total, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(over_sums + 1, sums, atol=1e-4, rtol=1e-5)
    return [y, dx, dw, added, total, sums]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    dw = dy.T @ x
    return [y, dy @ weight, dw, dw + 1, dw.to(acc(x.dtype)) + 1, dy.sum(0, dtype=acc(x.dtype)) + 1]


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=DEEP, ins=SIZES, outs=SIZES, bias=st.booleans())
def test_obeys_the_rule(ops: Any, dtype: torch.dtype, rows: int, ins: int, outs: int, bias: bool) -> None:
    compare(ops, rows, ins, outs, bias, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@given(ins=DEEP, outs=st.sampled_from([7, 65, 1030]))
def test_wide_layers_obey_the_rule(ops: Any, dtype: torch.dtype, ins: int, outs: int) -> None:
    compare(ops, 3, ins, outs, False, dtype)


def compare(ops: Any, rows: int, ins: int, outs: int, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight, dy = (drawn(i, *s, dtype=dtype) for i, s in enumerate([(rows, ins), (outs, ins), (rows, outs)]))
    bias = drawn(3, outs, dtype=dtype) if with_bias else None
    got = products(ops, x, weight, bias, dy)
    wide = [None if t is None else t.double() for t in (x, weight, bias, dy)]
    own, exact = plain(x, weight, bias, dy), plain(*wide)  # type: ignore[arg-type]
    for what, g, t, e in zip(("y", "dx", "dW", "dW + 1", "dW sum", "db sum"), got, own, exact, strict=True):
        # Terms of order one, `rows` of them: what fp32 sums may lose where they cancel.
        slack = 1e-6 * max(rows, ins, outs) ** 0.5
        close(g, t, e, what, slack)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_same_bits(ops: Any, dtype: torch.dtype) -> None:
    rows, ins, outs = 70, 66, 34
    x, weight, dy = (
        drawn(0, rows, ins, dtype=dtype),
        drawn(1, outs, ins, dtype=dtype),
        drawn(2, rows, outs, dtype=dtype),
    )
    bias = drawn(3, outs, dtype=dtype)
    expected = products(ops, x, weight, bias, dy)

    def padded(t: Tensor) -> Tensor:
        """The same values in rows that lie apart, with NaN between them."""
        wide = torch.full((t.shape[0], t.shape[1] + 5), torch.nan, dtype=dtype)
        return wide[:, 2 : t.shape[1] + 2].copy_(t)

    if dtype in DTYPES[:2]:  # torch's own products, which serve the others, round differently by layout
        assert same(products(ops, padded(x), padded(weight), bias, padded(dy)), expected)
        columns = (x.T.contiguous().T, weight.T.contiguous().T, bias, dy.T.contiguous().T)
        assert same(products(ops, *columns), expected)
    y = torch.full((rows, outs + 3), torch.nan, dtype=dtype)
    ops.linear_(y[:, 1 : outs + 1], x, weight, bias)
    torch.testing.assert_close(y[:, 1 : outs + 1], expected[0])
    assert y[:, 0].isnan().all() and y[:, outs + 1 :].isnan().all(), "written beyond its columns"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise(ops: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        x, weight, dy = (drawn(i, *s, dtype=torch.bfloat16) for i, s in enumerate([(300, 130), (257, 130), (300, 257)]))
        first = products(ops, x, weight, None, dy)
        assert all(same(products(ops, x, weight, None, dy), first) for _ in range(5))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "ins", "outs"), [(0, 8, 6), (4, 0, 6), (4, 8, 0)])
def test_empty(ops: Any, dtype: torch.dtype, rows: int, ins: int, outs: int) -> None:
    x, weight, dy = (
        torch.ones(rows, ins, dtype=dtype),
        torch.ones(outs, ins, dtype=dtype),
        torch.ones(rows, outs, dtype=dtype),
    )
    y, dx, dw = products(ops, x, weight, None, dy)[:3]
    assert torch.equal(y, x @ weight.T) and torch.equal(dx, dy @ weight) and torch.equal(dw, dy.T @ x)


def test_one_bad_row_stays_alone(ops: Any) -> None:
    """Tiles are filled up by zeros, not by neighbours: NaN and inf stay in their row, also with an odd width."""
    for ins in (64, 65):
        x, weight = drawn(0, 5, ins, dtype=torch.bfloat16), drawn(1, 9, ins, dtype=torch.bfloat16)
        clean, y = (poisoned(5, 9, dtype=torch.bfloat16) for _ in range(2))
        ops.linear_(clean, x, weight, None)
        x[2, 0] = torch.nan
        x[4, 0] = torch.inf
        ops.linear_(y, x, weight, None)
        assert y[2].isnan().all() and not y[4].isfinite().any()
        assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_serves_where_onednn_is_turned_off(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not ops.has_products_of(torch.bfloat16)
    compare(ops, 130, 66, 70, True, torch.bfloat16)
    monkeypatch.undo()
    compare(ops, 130, 66, 70, True, torch.bfloat16)


def test_serves_where_onednn_may_not_use_what_the_cpu_has(ops: Any) -> None:
    program = """
import torch
from megapre.kernels import library
library.register()
x, weight = torch.randn(130, 64).bfloat16(), torch.randn(70, 64).bfloat16()
y = torch.empty(130, 70, dtype=torch.bfloat16)
torch.ops.megapre.linear_(y, x, weight, None)
torch.testing.assert_close(y, x @ weight.T)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_batches_of_any_length_compile_few_kernels(ops: Any, tmp_path: Path) -> None:
    """oneDNN writes each kernel that it compiles into a file, if asked to."""
    program = """
import pathlib, torch
from megapre.kernels import library
library.register()
weight, dweight = torch.ones(70, 66).bfloat16(), torch.ones(70, 66)
for last in (64, 128, 200, 256):
    for rows in range(1, last + 1):
        x, y = torch.ones(rows, 66).bfloat16(), torch.ones(rows, 70).bfloat16()
        torch.ops.megapre.linear_(y, x, weight, None)
        torch.ops.megapre.linear_input_gradient_(x, y, weight)
        torch.ops.megapre.linear_weight_gradient_(dweight, None, y, x, False)
    print(len(list(pathlib.Path().glob("*.bin"))))
"""
    path = str(Path(native.__file__).parents[2])
    environment = {**os.environ, "ONEDNN_JIT_DUMP": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    short, *_, all_lengths = map(int, done.stdout.split())
    if not ops.has_products_of(torch.bfloat16):
        assert all_lengths == 0
        return
    assert 1 < short < 70 and all_lengths < 100, "three products of 256 lengths each"


def test_errors_have_numbers(ops: Any) -> None:
    x, weight, y = (torch.ones(*s, dtype=torch.bfloat16) for s in ((4, 8), (6, 8), (4, 6)))
    with pytest.raises(ValueError, match=r"x is BFloat16 \[4, 8\], weight Float \[6, 8\]"):
        ops.linear_(y, x, weight.float(), None)
    with pytest.raises(ValueError, match=r"bias has shape \[5\]; weight \[6, 8\] needs \[6\]"):
        ops.linear_(y, x, weight, torch.ones(5))
    with pytest.raises(ValueError, match=r"y has shape \[4, 5\].*\[4, 6\]"):
        ops.linear_(y[:, :5], x, weight, None)
    with pytest.raises(ValueError, match=r"dy is BFloat16 \[3, 6\] and x BFloat16 \[4, 8\]"):
        ops.linear_weight_gradient_(torch.ones(6, 8), None, y[:3], x, True)
    with pytest.raises(TypeError, match="dweight is Half; it can be Float or that of x, BFloat16"):
        ops.linear_weight_gradient_(weight.half(), None, y, x, True)
    with pytest.raises(TypeError, match="supported are fp32, bf16, fp16, fp64"):
        ops.linear_(y.int(), x.int(), weight.int(), None)
