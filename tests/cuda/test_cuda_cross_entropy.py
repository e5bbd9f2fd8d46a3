"""The CUDA cross_entropy under emulation: the 2x rule against fp64, layouts, shards, no rows, any order of warps."""

from collections.abc import Callable
from pathlib import Path

import emulated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor
from torch.nn import functional as F

from megapre.kernels import vocab_parallel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100
# Around a vector of 16 bytes, a warp of one vector each, two warps of eight.
VOCABS = st.integers(1, 40) | st.sampled_from([255, 256, 257, 1031, 2048, 2056, 4099])


def drawn(rows: int, width: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits whose columns from `vocab` on are NaN, and labels of which about every fifth is ignored."""
    generator = torch.Generator().manual_seed(seed + rows * 100_003 + vocab)
    logits = (torch.randn(rows, width, generator=generator, dtype=torch.float64) * 3).to(dtype)
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


def in_two(
    emulator: emulated.Emulator,
    logits: Tensor,
    labels: Tensor,
    vocab: int,
    smoothing: float,
    z_loss: float,
    dlosses: Tensor | None,
) -> list[Tensor]:
    """Losses and gradient by the separate ops."""
    settings = (IGNORE, smoothing, z_loss, vocab)
    losses, lse = emulator.ops.cross_entropy(logits, labels, *settings)
    ones = torch.ones_like(losses) if dlosses is None else dlosses
    return [losses, emulator.ops.cross_entropy_backward(ones, logits, labels, lse, *settings)]


def in_place(
    emulator: emulated.Emulator,
    logits: Tensor,
    labels: Tensor,
    vocab: int,
    smoothing: float,
    z_loss: float,
    dlosses: Tensor | None,
) -> list[Tensor]:
    """Losses, and the logits, which are overwritten."""
    version = logits._version
    losses = emulator.ops.cross_entropy_(logits, labels, dlosses, IGNORE, smoothing, z_loss, vocab)
    assert logits._version > version
    return [losses, logits]


def in_shards(
    emulator: emulated.Emulator,
    shards: list[Tensor],
    labels: Tensor,
    vocab: int,
    smoothing: float,
    z_loss: float,
    dlosses: Tensor | None,
) -> list[Tensor]:
    """Losses, and the joined gradient of shards, which are overwritten."""
    starts = [sum(s.shape[1] for s in shards[:rank]) for rank in range(len(shards))]
    stats = [
        emulator.ops.cross_entropy_local(s, labels, start, vocab, IGNORE, smoothing != 0)
        for s, start in zip(shards, starts, strict=True)
    ]
    losses, lse = vocab_parallel.merge(torch.stack(stats), labels, vocab, IGNORE, smoothing, z_loss)
    for shard, start in zip(shards, starts, strict=True):
        emulator.ops.cross_entropy_local_backward_(shard, labels, lse, dlosses, start, vocab, IGNORE, smoothing, z_loss)
    return [losses, torch.cat(shards, 1)]


def obeys(
    got: list[Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab: int,
    smoothing: float,
    z_loss: float,
    dlosses: Tensor | None,
) -> None:
    upstream = torch.ones(len(labels)) if dlosses is None else dlosses
    torchs = own(logits, labels, vocab, smoothing, z_loss, upstream)
    exact = own(logits.double(), labels, vocab, smoothing, z_loss, upstream)
    assert (got[0].dtype, got[1].dtype) == (torch.float32, logits.dtype)
    assert not got[1][:, vocab:].any()
    assert not got[0][labels == IGNORE].any() and not got[1][labels == IGNORE].any()
    for what, g, t, e in zip(("losses", "gradient"), got, torchs, exact, strict=True):
        close(g[..., :vocab], t[..., :vocab], e[..., :vocab], what)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 5),
    vocab=VOCABS,
    padding=st.sampled_from([0, 1, 47]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    weighted=st.booleans(),
)
def test_obeys_the_rule(
    loaded_emulator: emulated.Emulator,
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    padding: int,
    smoothing: float,
    z_loss: float,
    weighted: bool,
) -> None:
    """Every input at the end of its memory; rows of odd lengths begin anywhere within 16 bytes."""
    logits, labels = drawn(rows, vocab + padding, vocab, dtype)
    dlosses = torch.linspace(-2, 1, rows) if weighted else None
    terms = (vocab, smoothing, z_loss, None if dlosses is None else loaded_emulator.guarded(dlosses))
    guarded = loaded_emulator.guarded(labels)
    for way in (in_two, in_place):
        got = way(loaded_emulator, loaded_emulator.guarded(logits), guarded, *terms)
        obeys(got, logits, labels, vocab, smoothing, z_loss, dlosses)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 4),
    widths=st.lists(st.integers(0, 70) | st.sampled_from([2048, 2051]), min_size=1, max_size=5),
    padding=st.integers(0, 80),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
)
def test_shards_obey_the_rule(
    loaded_emulator: emulated.Emulator,
    dtype: torch.dtype,
    rows: int,
    widths: list[int],
    padding: int,
    smoothing: float,
    weighted: bool,
) -> None:
    """Uneven shards, empty ones, and last ones that hold padding alone; labels at the borders."""
    widths[0] += 1
    vocab = max(1, sum(widths) - padding)
    logits, labels = drawn(rows, sum(widths), vocab, dtype)
    borders = [sum(widths[:rank]) + side for rank in range(len(widths) + 1) for side in (-1, 0)]
    labels[0] = next(border for border in reversed(borders) if 0 <= border < vocab)
    shards = [loaded_emulator.guarded(shard) for shard in logits.split(widths, 1)]
    terms = (vocab, smoothing, 1e-2, torch.linspace(-2, 1, rows) if weighted else None)
    obeys(in_shards(loaded_emulator, shards, labels, *terms), logits, labels, *terms)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.bfloat16, 32773), (torch.bfloat16, 70001), (torch.float32, 66000)])
def test_wide_rows_by_clusters_and_without(
    emulator: emulated.Emulator, capability: int, dtype: torch.dtype, vocab: int
) -> None:
    emulator.device(capability=capability)
    logits, labels = drawn(3, vocab + 3, vocab, dtype)
    labels[0] = vocab - 1
    obeys(in_place(emulator, logits.clone(), labels, vocab, 0.1, 1e-3, None), logits, labels, vocab, 0.1, 1e-3, None)


def test_a_row_wider_than_a_cluster(emulator: emulated.Emulator) -> None:
    logits, labels = drawn(1, 131080, 131080, torch.float32, seed=1)
    labels[0] = 131079
    obeys(in_place(emulator, logits.clone(), labels, 131080, 0.0, 0.0, None), logits, labels, 131080, 0.0, 0.0, None)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.bfloat16, 16393), (torch.float16, 33001), (torch.float32, 33001)])
def test_few_rows_share_a_large_gpu(
    emulator: emulated.Emulator, capability: int, dtype: torch.dtype, vocab: int
) -> None:
    """On sm_90 two, four and eight blocks a row; the last block of a row may have little or nothing of it."""
    emulator.device(multiprocessors=132, capability=capability)
    logits, labels = drawn(3, vocab + 7, vocab, dtype)
    labels[0] = vocab - 1
    terms = (vocab, 0.1, 1e-3, None)
    shards = [shard.contiguous() for shard in logits.split([vocab - 5, 12], 1)]
    for got in (
        in_two(emulator, logits, labels, *terms),
        in_place(emulator, logits.clone(), labels, *terms),
        in_shards(emulator, shards, labels, *terms),
    ):
        obeys(got, logits, labels, *terms)


@pytest.mark.parametrize("vocab", [100, 4099, 40000])
def test_any_order_of_warps_gives_the_same_bits(emulator: emulated.Emulator, vocab: int) -> None:
    logits, labels = drawn(4, vocab, vocab, torch.bfloat16)
    terms, widths = (vocab, 0.1, 1e-3, None), [vocab // 3, vocab - vocab // 3]

    def run() -> list[Tensor]:
        shards = [shard.contiguous() for shard in logits.split(widths, 1)]
        return [
            *in_two(emulator, logits, labels, *terms),
            *in_place(emulator, logits.clone(), labels, *terms),
            *in_shards(emulator, shards, labels, *terms),
        ]

    expected = run()
    for seed in range(1, 4):
        emulator.schedule(seed)
        assert same(run(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout(emulator: emulated.Emulator, dtype: torch.dtype) -> None:
    """Rows that lie apart: what lies between them is left alone."""
    vocab, width = 100, 111
    logits, labels = drawn(5, width, vocab, dtype)
    terms = (vocab, 0.1, 1e-3, None)
    home = torch.full((5, width + 10), 7.0, dtype=dtype)
    apart = home[:, 3 : width + 3].copy_(logits)
    labels_apart = torch.stack([labels, labels], 1)[:, 0]
    obeys(in_two(emulator, apart, labels_apart, *terms), logits, labels, *terms)
    obeys(in_place(emulator, apart, labels_apart, *terms), logits, labels, *terms)
    assert home[:, :3].eq(7).all() and home[:, width + 3 :].eq(7).all()
    column_major = logits.t().contiguous().t()
    assert same(in_two(emulator, column_major, labels, *terms), in_two(emulator, logits, labels, *terms))
    with pytest.raises(ValueError, match="must be neighbours"):
        in_place(emulator, column_major, labels, *terms)
    with pytest.raises(ValueError, match="must not overlap"):
        in_place(emulator, logits[:1].expand(5, width), labels, *terms)


def test_offsets_beyond_31_bits(emulator: emulated.Emulator, far: Callable[[Tensor], Tensor]) -> None:
    logits, labels = drawn(3, 64, 64, torch.bfloat16)
    terms = (labels, 64, 0.1, 1e-3, None)
    expected = in_two(emulator, logits, *terms)
    assert same(in_two(emulator, far(logits), *terms), expected)
    for way in (in_place, lambda emulator, x, *terms: in_shards(emulator, [x], *terms)):
        assert same(way(emulator, far(logits), *terms), way(emulator, logits.clone(), *terms))


def test_confident_rows_keep_their_digits(emulator: emulated.Emulator) -> None:
    """Small losses among logits of a million, whose last place is worth more than the loss: lse - x_label is noise."""
    vocab = 5000
    above = torch.tensor([18.0, 20.0, 22.0, 24.0], dtype=torch.float64)
    logits, labels = torch.full((4, vocab), 1e6), torch.tensor([0, 17, 4096, 4999])
    logits[torch.arange(4), labels] += above.float()
    exact = torch.log1p((vocab - 1) * torch.exp(-above))
    losses, gradient = in_place(emulator, logits, labels, vocab, 0.0, 0.0, None)
    tolerance = vocab / 16 * torch.finfo(torch.float32).eps
    assert (losses - exact).abs().max() <= tolerance
    assert (gradient[torch.arange(4), labels] - torch.expm1(-exact)).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities(emulator: emulated.Emulator, dtype: torch.dtype) -> None:
    """Masked columns (-inf) have no probability; NaN and +inf poison their own row and no other."""
    vocab = 3000
    logits, _ = drawn(6, vocab, vocab, dtype)
    labels = torch.tensor([2999, 5, 6, 7, 8, 9])
    logits[0, :2500] = -torch.inf
    logits[1, 1000:] = -torch.inf
    logits[2, 2000] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    upstream = torch.ones(6)
    exact, torchs = (own(x, labels, vocab, 0.0, 0.0, upstream) for x in (logits.double(), logits))
    terms = (labels, vocab, 0.0, 0.0, None)
    shards = [shard.contiguous() for shard in logits.split(1000, 1)]
    for losses, gradient in (
        in_two(emulator, logits, *terms),
        in_place(emulator, logits.clone(), *terms),
        in_shards(emulator, shards, *terms),
    ):
        for row in (0, 1, 5):
            close(losses[row], torchs[0][row], exact[0][row], f"loss of row {row}")
            close(gradient[row], torchs[1][row], exact[1][row], f"gradient of row {row}")
        assert losses[2:5].isnan().all() and gradient[2].isnan().all() and gradient[4].isnan().all()
        assert not gradient[0, :2500].any() and not gradient[1, 1000:].any()


def test_certainty_costs_nothing(emulator: emulated.Emulator) -> None:
    logits, labels = torch.tensor([[3.0, -torch.inf], [-70.0, -torch.inf]]), torch.tensor([0, 0])
    for way in (in_two, in_place):
        losses, gradient = way(emulator, logits.clone(), labels, 2, 0.0, 0.0, None)
        assert not losses.any() and not gradient.any()


def test_ignored_rows_are_not_read(emulator: emulated.Emulator) -> None:
    logits, labels = torch.full((3, 40), torch.nan), torch.tensor([IGNORE, 1, IGNORE])
    logits[1] = 0.0
    terms = (labels, 40, 0.1, 1e-3, None)
    shards = [shard.contiguous() for shard in logits.split(20, 1)]
    for losses, gradient in (
        in_two(emulator, logits, *terms),
        in_shards(emulator, shards, *terms),
        in_place(emulator, logits, *terms),
    ):
        assert not losses[[0, 2]].any() and not gradient[[0, 2]].any() and gradient[1].any() and losses[1] > 0


@pytest.mark.parametrize("label", [-1, 30, 2**40, -(2**63)])
def test_a_label_outside_the_vocabulary_poisons_its_row(emulator: emulated.Emulator, label: int) -> None:
    """The host does not look at labels; nothing outside of the row is read."""
    logits, labels = torch.zeros(3, 32), torch.tensor([0, label, IGNORE])
    terms = (labels, 30, 0.0, 0.0, None)
    shards = [emulator.guarded(shard) for shard in logits.split(16, 1)]
    for losses, gradient in (
        in_two(emulator, emulator.guarded(logits), *terms),
        in_place(emulator, emulator.guarded(logits), *terms),
        in_shards(emulator, shards, *terms),
    ):
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient[1, :30].isnan().all() and not gradient[:, 30:].any() and not gradient[[0, 2]].isnan().any()


@pytest.mark.parametrize(("rows", "width"), [(0, 12), (3, 0)])
def test_empty(emulator: emulated.Emulator, rows: int, width: int) -> None:
    labels = torch.zeros(rows, dtype=torch.int64)
    stats = emulator.ops.cross_entropy_local(torch.empty(rows, width), labels, 5, 30, IGNORE, False)
    assert stats.tolist() == [[-torch.inf, 0.0, 0.0]] * rows
    emulator.ops.cross_entropy_local_backward_(
        torch.empty(rows, width), labels, torch.ones(rows), None, 5, 30, IGNORE, 0.0, 0.0
    )
    if width:
        for way in (in_two, in_place):
            losses, gradient = way(emulator, torch.empty(0, width), labels, 10, 0.1, 0.0, None)
            assert losses.shape == (0,) and gradient.shape == (0, width)


def test_what_cannot_be_is_said(emulator: emulated.Emulator) -> None:
    logits, labels = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)
    ops = emulator.ops
    with pytest.raises(ValueError, match=r"vocab 33 lies outside \[1, 32\]"):
        ops.cross_entropy(logits, labels, IGNORE, 0.0, 0.0, 33)
    with pytest.raises(ValueError, match=r"labels Long \[3\]"):
        ops.cross_entropy_(logits, labels[:3], None, IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match=r"label_smoothing 1.5"):
        ops.cross_entropy(logits, labels, IGNORE, 1.5, 0.0, 32)
    with pytest.raises(ValueError, match=r"labels are Int \[4\]; int64 on the device"):
        ops.cross_entropy(logits, labels.int(), IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take"):
        ops.cross_entropy(logits.double(), labels, IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match=r"dlosses is Double \[4\]; one Float per row"):
        ops.cross_entropy_(logits, labels, torch.ones(4, dtype=torch.float64), IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match="a shard from column -1 on of 64 columns"):
        ops.cross_entropy_local(logits, labels, -1, 64, IGNORE, False)
    with pytest.raises(ValueError, match=r"lse is Float \[3\]"):
        ops.cross_entropy_local_backward_(logits, labels, torch.zeros(3), None, 0, 64, IGNORE, 0.0, 0.0)


# What to change where, and what is said of it: a wrong result is so far "from fp64".
MUTATIONS = {
    "barrier": ("softmax_statistics.h", "    __syncthreads();\n", "", "from fp64"),
    "cluster": ("softmax_statistics.h", "    cluster_arrive();\n    cluster_wait();\n", "", "from fp64"),
    "leaves": ("softmax_statistics.h", "    cluster_wait();\n  }\n}\n\n}", "  }\n}\n\n}", "cluster, which has ended"),
    "bound": (
        "row_span.h",
        "tail = columns - head - vectors * N;",
        "tail = columns - vectors * N;",
        "of an allocation of 80012 bytes",
    ),
    "label": ("row_span.h", "vector % threads", "vector / threads", "from fp64"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated(loaded_emulator: emulated.Emulator, tmp_path: Path, mutation: str) -> None:
    """What is missing or shifted shows in rows that two blocks share, under one of four schedules."""
    *change, said = MUTATIONS[mutation]
    mutated = emulated.mutated(tmp_path, "cross_entropy", *change)
    logits, labels = drawn(2, 20003, 20003, torch.bfloat16)
    labels[:] = 10000

    with pytest.raises((AssertionError, RuntimeError), match=said):
        for seed in range(4):
            mutated.schedule(seed)
            terms = (mutated.guarded(logits), labels, 20003, 0.0, 0.0, None)
            obeys(in_two(mutated, *terms), logits, labels, 20003, 0.0, 0.0, None)
