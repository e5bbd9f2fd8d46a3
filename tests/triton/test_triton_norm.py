"""rms_norm and layer_norm: every width class, residual, bias, strided rows, empty input, repeatability."""

import pytest
import torch
from rule import alike, run, same, twice
from torch import Tensor
from torch.nn import functional as F

from megapre.kernels.triton import norm, ops


def inputs(rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = [(rows, width), (width,), (width,), (rows, width)]
    return [(torch.randn(s, generator=generator) * 2 + 0.5).to(device, dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 48), (150, 100), (3, 1536)])
@pytest.mark.parametrize("residual", [False, True])
def test_norms_obey_the_rule(device: str, dtype: torch.dtype, rows: int, width: int, residual: bool) -> None:
    x, weight, bias, extra = inputs(rows, width, dtype, device)
    rest = [extra] if residual else []

    def own_rms(x: Tensor, w: Tensor, *r: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = x + r[0] if r else x
        y = F.rms_norm(h, (width,), w, 1e-6)
        return (y, h) if r else y

    def own_layer(x: Tensor, w: Tensor, b: Tensor, *r: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = x + r[0] if r else x
        y = F.layer_norm(h, (width,), w, b, 1e-5)
        return (y, h) if r else y

    twice(lambda x, w, *r: ops.rms_norm(x, w, 1e-6, *r), own_rms, [x, weight, *rest])
    twice(lambda x, w, b, *r: ops.layer_norm(x, w, b, 1e-5, *r), own_layer, [x, weight, bias, *rest])


def test_a_width_whose_rows_are_loaded_twice(device: str) -> None:
    x, weight, bias, extra = inputs(2, 9000, torch.bfloat16, device)

    def own(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x + r, (9000,), w, b, 1e-5), x + r

    twice(lambda x, w, b, r: ops.layer_norm(x, w, b, 1e-5, r), own, [x, weight, bias, extra])


def test_layer_norm_without_bias_and_far_from_zero(device: str) -> None:
    """A mean of a thousand deviations: a variance from sums of squares would have no digit left."""
    x = (torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) + 1000).to(device)
    weight = torch.ones(300, device=device)
    twice(lambda x, w: ops.layer_norm(x, w), lambda x, w: F.layer_norm(x, (300,), w), [x, weight])


def test_wide_layer_norm_merges_the_variances_of_its_blocks(device: str) -> None:
    x = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0)).to(device)
    x[:, 10000:] += 100
    weight = torch.ones(20000, device=device)
    twice(lambda x, w: ops.layer_norm(x, w), lambda x, w: F.layer_norm(x, (20000,), w), [x, weight])


@pytest.mark.parametrize("op", [ops.rms_norm, ops.layer_norm])
def test_strided_and_empty_rows(device: str, op: object) -> None:
    base = torch.randn(6, 5, 48, device=device)
    weight = torch.randn(48, device=device)
    for x in (base.transpose(0, 1), base[::2, 1:4], base[:, :, ::2], base[:, :0], base[0, 0]):
        w = weight[: x.shape[-1]]
        strided, packed = run(op, [x, w]), run(op, [x.contiguous(), w.contiguous()])  # type: ignore[arg-type]
        assert strided[0][0].shape == x.shape
        alike(strided[0] + strided[1], packed[0] + packed[1])


def test_strided_weights(device: str) -> None:
    """Every other element of a tensor, and one element for all: a kernel that counts from the first reads others."""
    x, weight, bias, _ = inputs(3, 48, torch.float32, device)
    far = [torch.stack((t, t + 9), 1)[:, 0] for t in (weight, bias)]
    same_everywhere = weight[:1].expand(48)
    assert not any(t.is_contiguous() for t in (*far, same_everywhere))
    for w, b in ((far[0], far[1]), (same_everywhere, far[1])):
        got, expected = (run(lambda *t: ops.layer_norm(*t), [x, *t]) for t in ((w, b), (w.clone(), b.clone())))
        assert same(got[0] + got[1], expected[0] + expected[1])
        torch.testing.assert_close(ops.rms_norm(x, w), F.rms_norm(x, (48,), w, 1e-6))
        torch.testing.assert_close(ops.gelu(x, b), F.gelu(x + b, approximate="tanh"))


def test_more_rows_than_programs_and_bitwise_repeats(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs walk many rows each, as 132 do on a large input."""
    monkeypatch.setattr(norm, "multiprocessors", lambda _: 3)
    monkeypatch.setattr(norm, "backward_policy", lambda width: (2, 512, 1, 1))
    x, weight, bias, extra = inputs(33, 257, torch.bfloat16, device)
    tensors = [x, weight, bias]

    def own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (257,), w, b, 1e-5)

    twice(lambda *t: ops.layer_norm(*t), own, tensors)
    twice(lambda x, w, r: ops.rms_norm(x, w, 1e-6, r)[0], lambda x, w, r: F.rms_norm(x + r, (257,), w, 1e-6),
          [x, weight, extra])  # fmt: skip
    first, second = run(ops.layer_norm, tensors), run(ops.layer_norm, tensors)
    assert same(first[0] + first[1], second[0] + second[1])
    monkeypatch.setattr(norm, "WIDEST_HELD", 1)  # the kernel that loads a row twice
    twice(lambda *t: ops.layer_norm(*t), own, tensors)
    monkeypatch.setattr(norm, "WIDEST_TILE", 1)  # rows in blocks, the weight's gradient in a kernel of its own
    twice(lambda *t: ops.layer_norm(*t), own, tensors)


def test_fp64_is_refused(device: str) -> None:
    x = torch.randn(2, 4, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match="fp32, bf16 and fp16"):
        ops.rms_norm(x, x[0])
