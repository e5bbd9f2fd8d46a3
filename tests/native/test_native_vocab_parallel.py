"""Cross-entropy in halves over simulated shards: the whole op's losses and gradients, by the 2x rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor
from torch.nn import functional as F

from megapre.kernels import vocab_parallel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IGNORE = -100


def own(logits: Tensor, labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor) -> list[Tensor]:
    """Losses and gradient of torch's own cross_entropy over whole rows."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    leaf = logits.clone().requires_grad_()
    exist = leaf[:, :vocab].to(wide)
    losses = F.cross_entropy(exist, labels, ignore_index=IGNORE, label_smoothing=smoothing, reduction="none")
    if z_loss:
        losses = losses + (z_loss * exist.logsumexp(1).square()).where(labels != IGNORE, 0.0)
    (gradient,) = torch.autograd.grad(losses, leaf, dlosses.to(wide))
    return [losses.detach(), gradient]


def in_halves(
    shards: list[Tensor], labels: Tensor, vocab: int, smoothing: float, z_loss: float, dlosses: Tensor | None
) -> list[Tensor]:
    """Losses and the joined gradient; the shards are overwritten."""
    starts = [sum(s.shape[1] for s in shards[:rank]) for rank in range(len(shards))]
    stats = [
        vocab_parallel.local(s, labels, start, vocab, IGNORE, smoothing)
        for s, start in zip(shards, starts, strict=True)
    ]
    losses, lse = vocab_parallel.merge(torch.stack(stats), labels, vocab, IGNORE, smoothing, z_loss)
    for shard, start in zip(shards, starts, strict=True):
        vocab_parallel.gradient_(shard, labels, lse, dlosses, start, vocab, IGNORE, smoothing, z_loss)
    return [losses, torch.cat(shards, 1)]


def drawn(rows: int, widths: list[int], vocab: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits whose columns from `vocab` on are NaN; labels at the shards' borders and elsewhere, some ignored."""
    width = sum(widths)
    generator = torch.Generator().manual_seed(rows * 100_003 + width + vocab)
    logits = (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)
    logits[:, vocab:] = torch.nan
    borders = {sum(widths[:rank]) + side for rank in range(len(widths) + 1) for side in (-1, 0)}
    known = torch.tensor(sorted(b for b in borders if 0 <= b < vocab))
    at_border = known[torch.randint(len(known), (rows,), generator=generator)]
    anywhere = torch.randint(vocab, (rows,), generator=generator)
    labels = torch.where(torch.rand(rows, generator=generator) < 0.6, at_border, anywhere)
    labels[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    return logits, labels


def cut(logits: Tensor, widths: list[int]) -> list[Tensor]:
    return [shard.clone(memory_format=torch.contiguous_format) for shard in logits.split(widths, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 5),
    widths=st.lists(st.integers(0, 70) | st.sampled_from([4096, 4099]), min_size=1, max_size=8),
    padding=st.integers(0, 80),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    weighted=st.booleans(),
)
def test_obeys_the_rule(
    ops: Any,
    dtype: torch.dtype,
    rows: int,
    widths: list[int],
    padding: int,
    smoothing: float,
    z_loss: float,
    weighted: bool,
) -> None:
    """Uneven shards, empty ones, and last ones that hold padding alone."""
    widths[0] += 1
    vocab = max(1, sum(widths) - padding)
    logits, labels = drawn(rows, widths, vocab, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    dlosses = torch.linspace(-2, 1, rows, dtype=acc) if weighted else None
    upstream = torch.ones(rows) if dlosses is None else dlosses
    got = in_halves(cut(logits, widths), labels, vocab, smoothing, z_loss, dlosses)
    torchs = own(logits, labels, vocab, smoothing, z_loss, upstream)
    exact = own(logits.double(), labels, vocab, smoothing, z_loss, upstream)
    assert (got[0].dtype, got[1].dtype) == (acc, dtype)
    assert not got[1][:, vocab:].any() and not got[0][labels == IGNORE].any() and not got[1][labels == IGNORE].any()
    for what, g, t, e in zip(("losses", "gradient"), got, torchs, exact, strict=True):
        close(g[..., :vocab], t[..., :vocab], e[..., :vocab], what)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 4),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    padding=st.integers(0, 50),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_the_plain_forms_agree(
    ops: Any, dtype: torch.dtype, rows: int, widths: list[int], padding: int, smoothing: float
) -> None:
    vocab = max(1, sum(widths) - padding)
    logits, labels = drawn(rows, widths, vocab, dtype)
    start = 0
    for shard in cut(logits, widths):
        settings = (start, vocab, IGNORE)
        stats = vocab_parallel.local(shard, labels, *settings, smoothing)
        plain = vocab_parallel.local_reference(shard, labels, *settings, smoothing != 0)
        torch.testing.assert_close(stats, plain, rtol=1e-5, atol=1e-5)
        lse = torch.full((rows,), 5.0, dtype=stats.dtype)
        other = shard.clone()
        vocab_parallel.gradient_(shard, labels, lse, None, *settings, smoothing, 1e-3)
        vocab_parallel.gradient_reference_(other, labels, lse, None, *settings, smoothing, 1e-3)
        torch.testing.assert_close(shard, other)
        start += shard.shape[1]


def test_confident_rows_keep_their_digits(ops: Any) -> None:
    """A loss of 1e-8 among logits of a million; the others' columns add up to it."""
    above, vocab = torch.tensor([18.0, 20.0, 24.0], dtype=torch.float64), 4000
    logits = torch.full((3, vocab), 1e6)
    labels = torch.tensor([0, 1999, 2000])
    logits[torch.arange(3), labels] += above.float()
    losses, _ = in_halves(cut(logits, [2000, 2000]), labels, vocab, 0.0, 0.0, None)
    exact = torch.log1p((vocab - 1) * torch.exp(-above))
    assert (losses - exact).abs().max() <= vocab / 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities(ops: Any, dtype: torch.dtype) -> None:
    """Masked shards have no probability; NaN and +inf poison their own row, in every shard, and no other row."""
    widths = [300, 300, 300]
    logits, _ = drawn(6, widths, 900, dtype)
    labels = torch.tensor([899, 5, 6, 7, 8, 9])
    logits[0, :600] = -torch.inf
    logits[1, 300:] = -torch.inf
    logits[2, 700] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    upstream = torch.ones(6)
    exact, torchs = (own(x, labels, 900, 0.0, 0.0, upstream) for x in (logits.double(), logits))
    losses, gradient = in_halves(cut(logits, widths), labels, 900, 0.0, 0.0, None)
    for row in (0, 1, 5):
        close(losses[row], torchs[0][row], exact[0][row], f"loss of row {row}")
        close(gradient[row], torchs[1][row], exact[1][row], f"gradient of row {row}")
    assert losses[2:5].isnan().all() and gradient[2].isnan().all() and gradient[4].isnan().all()
    assert not gradient[0, :600].any() and not gradient[1, 300:].any()


def test_ignored_rows_are_not_read(ops: Any) -> None:
    labels = torch.tensor([IGNORE, 1])
    shards = [torch.full((2, 5), torch.nan), torch.zeros(2, 5)]
    shards[0][1] = 0
    losses, gradient = in_halves(shards, labels, 10, 0.1, 1e-3, None)
    assert losses[0] == 0 and losses[1] > 0 and not gradient[0].any() and gradient[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(ops: Any, dtype: torch.dtype) -> None:
    logits, labels = drawn(5, [40, 60], 90, dtype)
    expected = in_halves(cut(logits, [40, 60]), labels, 90, 0.1, 1e-3, None)
    home = torch.full((5, 120), 7.0, dtype=dtype)
    home[:, 5:45], home[:, 50:110] = logits[:, :40], logits[:, 40:]
    assert same(in_halves([home[:, 5:45], home[:, 50:110]], labels, 90, 0.1, 1e-3, None), expected)
    assert home[:, [*range(5), *range(45, 50), *range(110, 120)]].eq(7).all()
    with pytest.raises(ValueError, match="must be neighbours"):
        vocab_parallel.gradient_(logits.t().contiguous().t(), labels, expected[0], None, 0, 90)


def test_offsets_beyond_31_bits(ops: Any, far: Callable[[Tensor], Tensor]) -> None:
    logits, labels = drawn(3, [64], 64, torch.bfloat16)
    expected = in_halves(cut(logits, [64]), labels, 64, 0.0, 0.0, None)
    assert same(in_halves([far(logits)], labels, 64, 0.0, 0.0, None), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise_for_any_number_of_threads(ops: Any, threads: int) -> None:
    widths = [700, 411]
    logits, labels = drawn(300, widths, 1100, torch.float32)
    expected = in_halves(cut(logits, widths), labels, 1100, 0.1, 1e-3, None)
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert same(in_halves(cut(logits, widths), labels, 1100, 0.1, 1e-3, None), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("rows", "width"), [(0, 12), (3, 0)])
def test_empty(ops: Any, rows: int, width: int) -> None:
    labels = torch.zeros(rows, dtype=torch.int64)
    stats = vocab_parallel.local(torch.empty(rows, width), labels, 5, 30)
    assert stats.tolist() == [[-torch.inf, 0.0, 0.0]] * rows
    lse = torch.ones(rows)
    assert vocab_parallel.gradient_(torch.empty(rows, width), labels, lse, None, 5, 30).shape == (rows, width)


def test_errors_have_numbers(ops: Any) -> None:
    logits, labels = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"label 64 of row 2 lies outside \[0, 64\)"):
        vocab_parallel.local(logits, torch.tensor([0, IGNORE, 64, 0]), 0, 64)
    with pytest.raises(ValueError, match=r"label 64 of row 2"):
        vocab_parallel.gradient_(logits, torch.tensor([0, IGNORE, 64, 0]), torch.zeros(4), None, 0, 64)
    assert not logits.any()
    with pytest.raises(ValueError, match="a shard from column -1 on of 64 columns"):
        vocab_parallel.local(logits, labels, -1, 64)
    with pytest.raises(ValueError, match=r"labels \[3\]"):
        vocab_parallel.local(logits, labels[:3], 0, 64)
    with pytest.raises(TypeError, match="supported are fp32"):
        vocab_parallel.local(logits.int(), labels, 0, 64)
    with pytest.raises(ValueError, match=r"lse is Float \[3\]"):
        vocab_parallel.gradient_(logits, labels, torch.zeros(3), None, 0, 64)
    with pytest.raises(ValueError, match=r"label_smoothing 1.5"):
        vocab_parallel.gradient_(logits, labels, torch.zeros(4), None, 0, 64, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"stats are \(2, 4, 3\); \[ranks, 4, 4\] is needed for 4 labels"):
        vocab_parallel.merge(torch.zeros(2, 4, 3), labels, 64, label_smoothing=0.1)
