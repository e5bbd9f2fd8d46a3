"""The CUDA gelu, swiglu and geglu under emulation: the 2x rule against fp64, layouts, no rows, any order of warps."""

from collections.abc import Callable

import emulated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import alike, close, same
from torch import Tensor
from torch.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ["gelu", "gelu_erf", "gelu_bias", "gelu_erf_bias", "swiglu", "geglu"]
# Around a vector of 16 bytes, the 32 pieces of a warp, and the two of every thread of a block.
WIDTHS = [1, 3, 8, 24, 77, 256, 264, 1032, 4104]


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def composed(op: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own. It takes 16-bit inputs in fp32 inside, and rounds what one kernel hands to the next."""
    if op in ("swiglu", "geglu"):
        gate, up = x.chunk(2, -1)
        return (F.silu(gate) if op == "swiglu" else F.gelu(gate, approximate="tanh")) * up
    return F.gelu(x if bias is None else x + bias, approximate="none" if "erf" in op else "tanh")


def inputs(op: str, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, bias and dy, for rows of y of `width`."""
    x = drawn(0, rows, width * (2 if "glu" in op else 1), dtype=dtype)
    return x, drawn(1, width, dtype=dtype) if "bias" in op else None, drawn(2, rows, width, dtype=dtype)


def run(emulator: emulated.Emulator, op: str, x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """y, dx, and dbias if there is a bias."""
    if op in ("swiglu", "geglu"):
        return [getattr(emulator.ops, op)(x), getattr(emulator.ops, f"{op}_backward")(dy, x)]
    y = emulator.ops.gelu(x, bias, "erf" not in op)
    dx, dbias = emulator.ops.gelu_backward(dy, x, bias, "erf" not in op)
    assert dbias.shape == ((0,) if bias is None else bias.shape)
    return [y, dx] if bias is None else [y, dx, dbias]


def torchs(op: str, x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, bias) if t is not None]
    y = composed(op, leaves[0], leaves[1] if bias is not None else None)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def obeys(op: str, got: list[Tensor], x: Tensor, bias: Tensor | None, dy: Tensor) -> None:
    own = torchs(op, x, bias, dy)
    exact = torchs(op, x.double(), None if bias is None else bias.double(), dy.double())
    for what, g, t, e in zip(("y", "dx", "dbias"), got, own, exact, strict=False):
        assert (g.shape, g.dtype) == (e.shape, x.dtype)
        close(g, t, e, what)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 40), width=st.sampled_from(WIDTHS))
def test_obeys_the_rule(loaded_emulator: emulated.Emulator, op: str, dtype: torch.dtype, rows: int, width: int) -> None:
    """Every input at the end of its memory."""
    x, bias, dy = inputs(op, rows, width, dtype)
    guarded = [None if t is None else loaded_emulator.guarded(t) for t in (x, bias, dy)]
    obeys(op, run(loaded_emulator, op, *guarded), x, bias, dy)


@pytest.mark.parametrize("op", OPS)
def test_any_order_of_warps_gives_the_same_bits(emulator: emulated.Emulator, op: str) -> None:
    x, bias, dy = inputs(op, 300, 264, torch.bfloat16)
    expected = run(emulator, op, x, bias, dy)
    for seed in range(1, 5):
        emulator.schedule(seed)
        assert same(run(emulator, op, x, bias, dy), expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [40, 77])
def test_any_layout(emulator: emulated.Emulator, op: str, width: int) -> None:
    """The same bits, but for sums over rows that other threads have where rows lie across 16 bytes."""
    x, bias, dy = inputs(op, 12, width, torch.bfloat16)
    wide = x.shape[1]
    expected = run(emulator, op, x, bias, dy)
    padded = torch.full((12, wide + 16), torch.nan, dtype=x.dtype)[:, 8 : wide + 8].copy_(x)
    off_by_one = torch.full((12 * wide + 1,), torch.nan, dtype=x.dtype)[1:].copy_(x.flatten()).view(12, wide)
    turned = x.view(3, 4, wide).transpose(0, 1).contiguous().transpose(0, 1)
    for other in (padded, x.t().contiguous().t()):
        assert same(run(emulator, op, other, bias, dy.t().contiguous().t()), expected)
    alike(run(emulator, op, off_by_one, bias, dy), expected)
    got = run(emulator, op, turned, bias, dy.view(3, 4, width))
    assert same([t.reshape(e.shape) for t, e in zip(got, expected, strict=True)], expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_empty(emulator: emulated.Emulator, op: str, shape: tuple[int, ...]) -> None:
    half = (*shape[:-1], shape[-1] // 2) if "glu" in op else shape
    bias = torch.ones(shape[-1]) if "bias" in op else None
    y, dx, *dbias = run(emulator, op, torch.empty(shape), bias, torch.empty(half))
    assert y.shape == half and dx.shape == shape
    assert not any(t.any() for t in dbias)


@pytest.mark.parametrize("op", OPS)
def test_far_from_zero(emulator: emulated.Emulator, op: str) -> None:
    """Neither 0 times infinity nor a lost NaN: act(x) is x, or 0, and its slope is 1, or 0."""
    x = torch.tensor([[-torch.inf, -3e38, -1e20, -200.0, 200.0, 1e20, 3e38, torch.inf, torch.nan]]).repeat(1, 2)
    gated = "glu" in op
    if gated:
        x[:, 9:] = 1.0
    else:
        x = x[:, :9]
    y, dx, *_ = run(emulator, op, x, torch.zeros(9) if "bias" in op else None, torch.ones(1, 9))
    assert y[0, :4].abs().max() < 1e-30 and torch.equal(y[0, 4:8], x[0, 4:8]) and y[0, 8].isnan()
    assert dx[0, :4].abs().max() < 1e-30 and torch.equal(dx[0, 4:8], torch.ones(4)) and dx[0, 8].isnan()


@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_31_bits(emulator: emulated.Emulator, op: str, far: Callable[[Tensor], Tensor]) -> None:
    x, bias, dy = inputs(op, 3, 40, torch.bfloat16)
    assert same(run(emulator, op, far(x), bias, far(dy)), run(emulator, op, x, bias, dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_bias_of_another_dtype(emulator: emulated.Emulator, dtype: torch.dtype) -> None:
    x, _, dy = inputs("gelu_bias", 20, 64, torch.bfloat16)
    bias = drawn(1, 64, dtype=dtype)
    y, _, dbias = run(emulator, "gelu_bias", x, bias, dy)
    exact = torchs("gelu_bias", x.double(), bias.double(), dy.double())
    own = torchs("gelu_bias", x.float(), bias.float(), dy.float())
    assert dbias.dtype == dtype
    close(y, own[0].bfloat16(), exact[0])
    close(dbias, own[2].to(dtype), exact[2], slack=1e-4 if dtype == torch.float64 else 0.0)  # the sum is fp32


def test_few_rows_and_many_multiprocessors(emulator: emulated.Emulator) -> None:
    """More blocks than rows, and more rows than blocks: the gradient of the bias is another order of a sum."""
    x, bias, dy = inputs("gelu_bias", 100, 24, torch.float32)
    results = []
    for multiprocessors in (1, 132):
        emulator.device(multiprocessors)
        results.append(run(emulator, "gelu_bias", x, bias, dy))
    assert same(results[0][:2], results[1][:2])
    torch.testing.assert_close(*(r[2] for r in results))
    obeys("gelu_bias", results[1], x, bias, dy)


def test_what_cannot_be_is_said(emulator: emulated.Emulator) -> None:
    x, ops = torch.zeros(4, 16), emulator.ops
    with pytest.raises(ValueError, match="swiglu: the last dim is 15; gate and up need an even one"):
        ops.swiglu(x[:, :15])
    with pytest.raises(ValueError, match=r"geglu_backward: dy is Float \[4, 16\] but x is Float \[4, 16\]; half its"):
        ops.geglu_backward(x, x)
    with pytest.raises(ValueError, match=r"gelu: bias is Float \[15\] but rows of the input have 16 elements"):
        ops.gelu(x, torch.zeros(15), True)
    with pytest.raises(ValueError, match=r"gelu_backward: dy is Float \[4, 8\] but x is Float \[4, 16\]"):
        ops.gelu_backward(x[:, :8], x, None, True)
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take fp32, bf16 and fp16"):
        ops.gelu(x.double(), None, True)
