"""The CUDA norms under emulation: the 2x rule against fp64, layouts, empty input, any order of warps."""

from collections.abc import Callable

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import alike, close, same
from torch import Tensor
from torch.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
# Around the limits of the policy: one access a thread, one warp a row, four warps, more blocks than one a row.
WIDTHS = [1, 8, 77, 248, 256, 264, 512, 520, 1000, 1024, 1032, 2049, 4104]
WIDE = [16384, 16392, 16385, 40000]


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.5).to(dtype)


def forward(
    emulator: emulated.Emulator, op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> list[Tensor]:
    """y, h and the statistics; every input at the end of its memory."""
    x, weight = emulator.guarded(x), emulator.guarded(weight)
    residual = None if residual is None else emulator.guarded(residual)
    if op == "rms_norm":
        return list(emulator.ops.rms_norm(x, weight, EPS, residual))
    bias = None if bias is None else emulator.guarded(bias)
    return list(emulator.ops.layer_norm(x, weight, bias, EPS, residual))


def torchs(op: str, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if op == "rms_norm":
        return F.rms_norm(h, weight.shape, weight, EPS)
    return F.layer_norm(h, weight.shape, weight, bias, EPS)


def backward(
    emulator: emulated.Emulator, op: str, dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """dx, dweight and, of a layer_norm with a bias, dbias; every input at the end of its memory."""
    *_, mean, rstd = forward(emulator, op, h, weight, bias, None)
    dy, h, weight = (emulator.guarded(t) for t in (dy, h, weight))
    dh = None if dh is None else emulator.guarded(dh)
    if op == "rms_norm":
        return list(emulator.ops.rms_norm_backward(dy, dh, h, weight, rstd))
    dx, dweight, dbias = emulator.ops.layer_norm_backward(dy, dh, h, weight, bias, mean, rstd)
    assert bias is not None or dbias.numel() == 0
    return [dx, dweight] if bias is None else [dx, dweight, dbias]


def autograd(op: str, dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (h, weight, *([] if bias is None else [bias]))]
    y = torchs(op, leaves[0], leaves[1], None if bias is None else leaves[2])
    outputs, upstream = ((y, leaves[0] * 1), (dy, dh)) if dh is not None else ((y,), (dy,))
    return list(torch.autograd.grad(outputs, leaves, upstream))


def backward_obeys(
    emulator: emulated.Emulator, op: str, rows: int, width: int, dtype: torch.dtype, affine: bool, residual: bool
) -> None:
    h, dy, extra = (drawn(i, rows, width, dtype=dtype) for i in range(3))
    weight, bias = (drawn(i, width, dtype=dtype) for i in (4, 5))
    arguments = (dy, extra if residual else None, h, weight, bias if affine and op == "layer_norm" else None)
    got, own = backward(emulator, op, *arguments), autograd(op, *arguments)
    exact = autograd(op, *(None if t is None else t.double() for t in arguments))
    lost = 0.0
    if (op, width) == ("rms_norm", 1):  # dx = g rstd (1 - n^2), and n^2 is 1 but for eps: a few ulps of g rstd remain
        rstd = torch.rsqrt(h.double().square() + EPS)
        lost = 4 * torch.finfo(torch.float32).eps * (dy.double() * weight * rstd).abs().max().item()
    for what, g, t, e in zip(("dx", "dweight", "dbias"), got, own, exact, strict=False):
        assert g.dtype == dtype
        close(g, t, e, what, lost if what == "dx" else 0.0)


def obeys(
    emulator: emulated.Emulator, op: str, rows: int, width: int, dtype: torch.dtype, affine: bool, residual: bool
) -> None:
    x, extra = (drawn(i, rows, width, dtype=dtype) for i in range(2))
    weight, bias = drawn(4, width, dtype=dtype), drawn(5, width, dtype=dtype) if affine else None
    y, h, *_, rstd = forward(emulator, op, x, weight, bias, extra if residual else None)
    if residual:
        assert torch.equal(h, x + extra)
    else:
        assert h.numel() == 0
        h = x
    assert y.dtype == dtype and rstd.shape == (rows,) and rstd.dtype == torch.float32
    wide_bias = None if bias is None else bias.double()
    close(y, torchs(op, h, weight, bias), torchs(op, h.double(), weight.double(), wide_bias), "y")


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(rows=st.integers(1, 9), width=st.sampled_from(WIDTHS), affine=st.booleans(), residual=st.booleans())
def test_forward_obeys_the_rule(
    loaded_emulator: emulated.Emulator,
    op: str,
    dtype: torch.dtype,
    rows: int,
    width: int,
    affine: bool,
    residual: bool,
) -> None:
    obeys(loaded_emulator, op, rows, width, dtype, affine, residual)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(rows=st.integers(1, 70), width=st.sampled_from(WIDTHS), affine=st.booleans(), residual=st.booleans())
def test_backward_obeys_the_rule(
    loaded_emulator: emulated.Emulator,
    op: str,
    dtype: torch.dtype,
    rows: int,
    width: int,
    affine: bool,
    residual: bool,
) -> None:
    backward_obeys(loaded_emulator, op, rows, width, dtype, affine, residual)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("width", [8192, 8200, 8201, 20000])
@pytest.mark.parametrize("capability", [80, 90])
def test_wide_rows_backward_by_clusters_and_without(
    emulator: emulated.Emulator, op: str, width: int, capability: int
) -> None:
    """With one cluster at a time of four blocks, which walks over all rows, and four of two."""
    emulator.device(multiprocessors=9 if width < 20000 else 7, capability=capability)
    backward_obeys(emulator, op, 7, width, torch.bfloat16, affine=True, residual=True)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("width", WIDE)
@pytest.mark.parametrize("capability", [80, 90])
def test_wide_rows_forward_by_clusters_and_without(
    emulator: emulated.Emulator, op: str, width: int, capability: int
) -> None:
    emulator.device(capability=capability)
    obeys(emulator, op, 2, width, torch.bfloat16, affine=True, residual=True)


def test_a_row_wider_than_a_cluster(emulator: emulated.Emulator) -> None:
    obeys(emulator, "layer_norm", 1, 8 * 16384 + 8, torch.bfloat16, affine=True, residual=False)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("width", [100, 1032, 40000])
def test_any_order_of_warps_gives_the_same_bits(emulator: emulated.Emulator, op: str, width: int) -> None:
    x, extra = (drawn(i, 5, width, dtype=torch.bfloat16) for i in range(2))
    weight, bias = (drawn(i, width, dtype=torch.bfloat16) for i in (2, 3))
    expected = forward(emulator, op, x, weight, bias, extra)
    for seed in range(1, 6):
        emulator.schedule(seed)
        assert same(forward(emulator, op, x, weight, bias, extra), expected)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("width", [100, 1032, 20000])
def test_any_order_of_warps_gives_the_same_gradients(emulator: emulated.Emulator, op: str, width: int) -> None:
    h, dy, dh = (drawn(i, 29 if width < 2000 else 5, width, dtype=torch.bfloat16) for i in range(3))
    weight, bias = (drawn(i, width, dtype=torch.bfloat16) for i in (3, 4))
    expected = backward(emulator, op, dy, dh, h, weight, bias)
    for seed in range(1, 4):
        emulator.schedule(seed)
        assert same(backward(emulator, op, dy, dh, h, weight, bias), expected)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("width", [64, 77])
def test_any_layout(emulator: emulated.Emulator, op: str, width: int) -> None:
    """The same bits, but where rows that lie across 16 bytes are read by other threads than rows that do not."""
    x, weight = drawn(0, 12, width, dtype=torch.bfloat16), drawn(1, width, dtype=torch.bfloat16)

    def run(x: Tensor, w: Tensor) -> list[Tensor]:
        return list(
            emulator.ops.rms_norm(x, w, EPS, x) if op == "rms_norm" else emulator.ops.layer_norm(x, w, w, EPS, x)
        )

    expected = run(x, weight)
    padded = torch.full((12, width + 16), torch.nan, dtype=x.dtype)[:, 8 : width + 8].copy_(x)
    off_by_one = torch.full((12 * width + 1,), torch.nan, dtype=x.dtype)[1:].copy_(x.flatten()).view(12, width)
    every_second = torch.full((2 * width,), torch.nan, dtype=x.dtype)[::2].copy_(weight)
    turned = x.view(3, 4, width).transpose(0, 1).contiguous().transpose(0, 1)
    for other in (padded, x.t().contiguous().t(), turned):
        assert same([t.reshape(e.shape) for t, e in zip(run(other, every_second), expected, strict=True)], expected)
    alike(run(off_by_one, weight), expected)
    assert same(run(x[:1].expand(12, width), weight), run(x[:1].repeat(12, 1), weight))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_empty(emulator: emulated.Emulator, shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.ones(shape[-1])
    y, h, mean, rstd = emulator.ops.layer_norm(x, weight, weight, EPS, x)
    assert y.shape == h.shape == shape and mean.numel() == rstd.numel() == x.shape[:-1].numel()
    dx, dweight, dbias = emulator.ops.layer_norm_backward(y, None, h, weight, weight, mean, rstd)
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1])) and torch.equal(dbias, torch.zeros(shape[-1]))


def test_parameters_of_another_dtype(emulator: emulated.Emulator) -> None:
    x = drawn(0, 5, 64, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.float64):
        weight, bias = drawn(1, 64, dtype=dtype), drawn(2, 64, dtype=dtype)
        y, _, mean, rstd = emulator.ops.layer_norm(x, weight, bias, EPS, None)
        exact = F.layer_norm(x.double(), (64,), weight.double(), bias.double(), EPS)
        close(y, F.layer_norm(x.float(), (64,), weight.float(), bias.float(), EPS).bfloat16(), exact)
        _, dweight, dbias = emulator.ops.layer_norm_backward(x, None, x, weight, bias, mean, rstd)
        normed = F.layer_norm(x.double(), (64,), None, None, EPS)
        assert dweight.dtype == dbias.dtype == dtype
        torch.testing.assert_close(dweight.double(), (x * normed).sum(0), rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(dbias.double(), x.double().sum(0), rtol=2e-3, atol=1e-5)


def test_what_cannot_be_is_said(emulator: emulated.Emulator) -> None:
    x, weight = torch.randn(4, 16), torch.ones(16)
    with pytest.raises(ValueError, match=r"rms_norm: weight is Float \[15\] but rows of the input have 16 elements"):
        emulator.ops.rms_norm(x, weight[:15], EPS, None)
    with pytest.raises(
        ValueError, match=r"residual is Float \[4, 8\] but x is Float \[4, 16\]; they must have the same"
    ):
        emulator.ops.rms_norm(x, weight, EPS, x[:, :8])
    with pytest.raises(ValueError, match=r"rstd is Float \[3\]; one fp32 per row of h Float \[4, 16\] is needed"):
        emulator.ops.rms_norm_backward(x, None, x, weight, weight[:3])
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take fp32, bf16 and fp16"):
        emulator.ops.rms_norm(x.double(), weight, EPS, None)


def test_what_lies_on_another_device_is_not_read(emulator: emulated.Emulator) -> None:
    x, weight, rstd = torch.randn(4, 16), torch.ones(16), torch.ones(4)

    def call(op: torch._ops.OpOverload, *arguments: object) -> None:
        op._op_dk(torch._C.DispatchKey.CPU, *arguments)

    ops = emulator.ops
    with pytest.raises(ValueError, match=r"rms_norm: weight is on another device than Float \[4, 16\]; move it there"):
        call(ops.rms_norm.default, x, weight.to("meta"), EPS, None)
    with pytest.raises(ValueError, match="layer_norm: bias is on another device"):
        call(ops.layer_norm.default, x, weight, weight.to("meta"), EPS, None)
    with pytest.raises(ValueError, match="rms_norm: rstd is on another device"):
        call(ops.rms_norm_backward.default, x, None, x, weight, rstd.to("meta"))
    with pytest.raises(ValueError, match="gelu: bias is on another device"):
        call(ops.gelu.default, x, weight.to("meta"), True)


def test_offsets_beyond_31_bits(emulator: emulated.Emulator, far: Callable[[Tensor], Tensor]) -> None:
    x, extra, dy, dh = (drawn(i, 3, 40, dtype=torch.bfloat16) for i in range(4))
    weight = drawn(4, 40, dtype=torch.bfloat16)
    y, h, rstd = emulator.ops.rms_norm(x, weight, EPS, extra)
    assert same(emulator.ops.rms_norm(far(x), weight, EPS, far(extra)), [y, h, rstd])
    expected = emulator.ops.rms_norm_backward(dy, dh, h, weight, rstd)
    assert same(emulator.ops.rms_norm_backward(far(dy), far(dh), far(h), weight, rstd), expected)
