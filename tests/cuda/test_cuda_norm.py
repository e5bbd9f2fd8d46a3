"""The CUDA norms under emulation: the 2x rule against fp64, layouts, empty input, any order of warps."""

import emulated
import pytest
import torch
from hypothesis import given
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


def test_parameters_of_another_dtype(emulator: emulated.Emulator) -> None:
    x = drawn(0, 5, 64, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.float64):
        weight, bias = drawn(1, 64, dtype=dtype), drawn(2, 64, dtype=dtype)
        y = emulator.ops.layer_norm(x, weight, bias, EPS, None)[0]
        exact = F.layer_norm(x.double(), (64,), weight.double(), bias.double(), EPS)
        close(y, F.layer_norm(x.float(), (64,), weight.float(), bias.float(), EPS).bfloat16(), exact)


def test_what_cannot_be_is_said(emulator: emulated.Emulator) -> None:
    x, weight = torch.randn(4, 16), torch.ones(16)
    with pytest.raises(ValueError, match=r"rms_norm: weight is Float \[15\] but rows of the input have 16 elements"):
        emulator.ops.rms_norm(x, weight[:15], EPS, None)
    with pytest.raises(
        ValueError, match=r"residual is Float \[4, 8\] but x is Float \[4, 16\]; they must have the same"
    ):
        emulator.ops.rms_norm(x, weight, EPS, x[:, :8])
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take fp32, bf16 and fp16"):
        emulator.ops.rms_norm(x.double(), weight, EPS, None)
