"""The C++ cross_entropy, op by op: the 2x rule against fp64, layouts, empty input, poison, repeatability, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor
from torch.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IGNORE = -100
# Around lane groups (8 to 32 columns), unrolled pairs of them, and blocks of 4096 columns.
VOCABS = st.integers(1, 140) | st.sampled_from([257, 4095, 4096, 4097, 8191, 9000])


def drawn(
    rows: int, width: int, vocab: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits whose columns from `vocab` on are NaN, and labels of which about every fifth is ignored."""
    generator = torch.Generator().manual_seed(seed + rows * 100_003 + vocab)
    logits = (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)
    logits[:, vocab:] = torch.nan
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    return logits, labels


def own(logits: Tensor, labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor) -> list[Tensor]:
    """Losses and gradient of torch's own cross_entropy, which needs 16-bit logits in fp32 to give fp32 losses."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    leaf = logits.clone().requires_grad_()
    exist = leaf[:, :vocab].to(wide)
    losses = F.cross_entropy(exist, labels, ignore_index=IGNORE, label_smoothing=smoothing, reduction="none")
    if z_loss:
        losses = losses + (z_loss * exist.logsumexp(1).square()).where(labels != IGNORE, 0.0)
    (gradient,) = torch.autograd.grad(losses, leaf, dlosses.to(wide))
    return [losses.detach(), gradient]


def native(
    ops: Any, logits: Tensor, labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradient by the separate ops, and by the op that works in place."""
    settings = (IGNORE, smoothing, z_loss, vocab)
    losses, lse = ops.cross_entropy(logits, labels, *settings)
    ones = torch.ones_like(losses) if dlosses is None else dlosses
    gradient = ops.cross_entropy_backward(ones, logits, labels, lse, *settings)
    in_place = logits.clone(memory_format=torch.contiguous_format)
    return [losses, gradient], [ops.cross_entropy_(in_place, labels, dlosses, *settings), in_place]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 6),
    vocab=VOCABS,
    padding=st.sampled_from([0, 1, 47]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    weighted=st.booleans(),
)
def test_obeys_the_rule(
    ops: Any, dtype: torch.dtype, rows: int, vocab: int, padding: int, smoothing: float, z_loss: float, weighted: bool
) -> None:
    logits, labels = drawn(rows, vocab + padding, vocab, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    dlosses = torch.linspace(-2, 1, rows, dtype=acc) if weighted else None
    upstream = torch.ones(rows) if dlosses is None else dlosses
    torchs = own(logits, labels, vocab, smoothing, z_loss, upstream)
    exact = own(logits.double(), labels, vocab, smoothing, z_loss, upstream)
    for way in native(ops, logits, labels, vocab, smoothing, z_loss, dlosses):
        assert (way[0].dtype, way[1].dtype) == (acc, dtype)
        assert torch.equal(way[1][:, vocab:], torch.zeros(rows, padding, dtype=dtype))
        assert not way[0][labels == IGNORE].any() and not way[1][labels == IGNORE].any()
        for what, got, t, e in zip(("losses", "gradient"), way, torchs, exact, strict=True):
            close(got[..., :vocab], t[..., :vocab], e[..., :vocab], what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_rows_keep_their_digits(ops: Any, dtype: torch.dtype) -> None:
    """Small losses among logits of a million, whose last place is worth more than the loss: lse - x_label is noise.

    What remains is the sum: up to vocab / 8 terms a lane, half an ulp of 1 each.
    """
    vocab = 5000
    above = torch.tensor([18.0, 20.0, 22.0, 24.0], dtype=torch.float64)
    logits, labels = torch.full((4, vocab), 1e6, dtype=dtype), torch.tensor([0, 17, 4096, 4999])
    logits[torch.arange(4), labels] += above.to(dtype)
    exact = torch.log1p((vocab - 1) * torch.exp(-above))
    losses = ops.cross_entropy_(logits, labels, None, IGNORE, 0.0, 0.0, vocab)
    tolerance = vocab / 16 * torch.finfo(dtype).eps
    assert (losses - exact).abs().max() <= tolerance
    assert (logits[torch.arange(4), labels] - torch.expm1(-exact)).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_certainty_costs_nothing(ops: Any, dtype: torch.dtype) -> None:
    """exp(0) is 1: a loss below 0, or a gradient where there is nothing to learn, would be the exponential's error."""
    logits, labels = torch.tensor([[3.0, -torch.inf], [-70.0, -torch.inf]], dtype=dtype), torch.tensor([0, 0])
    for losses, gradient in native(ops, logits, labels, 2, 0.0, 0.0, None):
        assert not losses.any() and not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities(ops: Any, dtype: torch.dtype) -> None:
    """Masked columns (-inf) have no probability; NaN and +inf poison their own row and no other."""
    vocab = 9000
    logits, _ = drawn(6, vocab, vocab, dtype)
    labels = torch.tensor([8999, 5, 6, 7, 8, 9])
    logits[0, :8500] = -torch.inf  # the first two blocks hold nothing else
    logits[1, 4096:] = -torch.inf
    logits[2, 8000] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    upstream = torch.ones(6)
    exact = own(logits.double(), labels, vocab, 0.0, 0.0, upstream)
    torchs = own(logits, labels, vocab, 0.0, 0.0, upstream)
    assert ops.cross_entropy(logits, labels, IGNORE, 0.0, 0.0, vocab)[1][2:4].isnan().all()
    for way in native(ops, logits, labels, vocab, 0.0, 0.0, None):
        for row in (0, 1, 5):
            close(way[0][row], torchs[0][row], exact[0][row], f"loss of row {row}")
            close(way[1][row], torchs[1][row], exact[1][row], f"gradient of row {row}")
        assert way[0][2:5].isnan().all()
        assert way[1][2].isnan().all() and way[1][4].isnan().all()
        assert not way[1][0, :8500].any() and not way[1][1, 4096:].any()


def test_ignored_rows_are_not_read(ops: Any) -> None:
    logits = torch.full((3, 40), torch.nan)
    labels = torch.tensor([IGNORE, 1, IGNORE])
    logits[1] = 0.0
    for losses, gradient in native(ops, logits, labels, 40, 0.1, 1e-3, None):
        assert torch.equal(losses.isnan(), torch.zeros(3, dtype=torch.bool))
        assert not gradient[[0, 2]].any() and gradient[1].any()
    other = labels.where(labels != IGNORE, 7)
    assert ops.cross_entropy(logits, other, 7, 0.0, 0.0, 40)[0][[0, 2]].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(ops: Any, dtype: torch.dtype) -> None:
    """Rows that lie apart: same bits, and what lies between them is left alone."""
    vocab, width = 100, 111
    logits, labels = drawn(5, width, vocab, dtype)
    expected = native(ops, logits, labels, vocab, 0.1, 1e-3, None)
    home = torch.full((5, width + 9), 7.0, dtype=dtype)
    apart = home[:, 3 : width + 3].copy_(logits)
    twice_apart = torch.stack([labels, labels], 1)[:, 0]
    assert same(native(ops, apart, twice_apart, vocab, 0.1, 1e-3, None)[0], expected[0])
    assert same([ops.cross_entropy_(apart, twice_apart, None, IGNORE, 0.1, 1e-3, vocab), apart], expected[1])
    assert home[:, :3].eq(7).all() and home[:, width + 3 :].eq(7).all()
    column_major = logits.t().contiguous().t()
    for got, wanted in zip(native(ops, column_major, labels, vocab, 0.1, 1e-3, None), expected, strict=True):
        assert same(got, wanted)
    with pytest.raises(ValueError, match="must be neighbours"):
        ops.cross_entropy_(column_major, labels, None, IGNORE, 0.0, 0.0, vocab)
    with pytest.raises(ValueError, match="must not overlap"):
        ops.cross_entropy_(logits[:1].expand(5, width), labels, None, IGNORE, 0.0, 0.0, vocab)


def test_offsets_beyond_31_bits(ops: Any, far: Callable[[Tensor], Tensor]) -> None:
    logits, labels = drawn(3, 64, 64, torch.bfloat16)
    apart = far(logits)
    (losses, gradient), (_, in_place) = native(ops, logits, labels, 64, 0.0, 0.0, None)
    assert same(native(ops, apart, labels, 64, 0.0, 0.0, None)[0], [losses, gradient])
    ops.cross_entropy_(apart, labels, None, IGNORE, 0.0, 0.0, 64)
    assert torch.equal(apart, in_place)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise_for_any_number_of_threads(ops: Any, threads: int) -> None:
    logits, labels = drawn(300, 1111, 1111, torch.float32)
    expected = native(ops, logits, labels, 1111, 0.1, 1e-3, None)
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            for got, wanted in zip(native(ops, logits, labels, 1111, 0.1, 1e-3, None), expected, strict=True):
                assert same(got, wanted)  # a row belongs to one thread, so their number does not matter
    finally:
        torch.set_num_threads(1)


def test_empty(ops: Any) -> None:
    for losses, gradient in native(ops, torch.empty(0, 12), torch.empty(0, dtype=torch.int64), 10, 0.1, 0.0, None):
        assert losses.shape == (0,) and gradient.shape == (0, 12)


@pytest.mark.parametrize("label", [-1, 30, 32, 2**40, -(2**63)])
def test_a_label_outside_the_vocabulary_changes_nothing(ops: Any, label: int) -> None:
    logits, labels = torch.zeros(4, 32), torch.tensor([0, 29, label, IGNORE])
    for call in (ops.cross_entropy, lambda *args: ops.cross_entropy_(*args[:2], None, *args[2:])):
        with pytest.raises(ValueError, match=rf"label {label} of row 2 lies outside \[0, 30\)"):
            call(logits, labels, IGNORE, 0.0, 0.0, 30)
    assert not logits.any()


def test_errors_have_numbers(ops: Any) -> None:
    logits, labels = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"vocab 33 lies outside \[1, 32\]"):
        ops.cross_entropy(logits, labels, IGNORE, 0.0, 0.0, 33)
    with pytest.raises(ValueError, match=r"vocab 0 lies outside"):
        ops.cross_entropy(logits, labels, IGNORE, 0.0, 0.0, 0)
    with pytest.raises(ValueError, match=r"labels \[3\]"):
        ops.cross_entropy(logits, labels[:3], IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match=r"label_smoothing 1.5"):
        ops.cross_entropy(logits, labels, IGNORE, 1.5, 0.0, 32)
    with pytest.raises(TypeError, match="labels are Int, not int64"):
        ops.cross_entropy(logits, labels.int(), IGNORE, 0.0, 0.0, 32)
    with pytest.raises(TypeError, match="supported are fp32"):
        ops.cross_entropy(logits.int(), labels, IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match=r"dlosses is Double"):
        ops.cross_entropy_(logits, labels, torch.ones(4, dtype=torch.float64), IGNORE, 0.0, 0.0, 32)
