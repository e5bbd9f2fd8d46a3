"""The CUDA gradient of the embedding under emulation: the 2x rule against fp64, runs of any length, shards, layouts."""

from collections.abc import Callable
from pathlib import Path

import emulated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around a piece of 32 tokens, and the 16 pieces that fill one of the next list.
TOKENS = st.integers(0, 70) | st.sampled_from([511, 512, 513, 1100])
# Around a panel of 32 vectors of one and of four.
WIDTHS = st.integers(1, 40) | st.sampled_from([64, 127, 128, 132, 260])


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens_of(count: int, vocab: int, skew: int, seed: int = 0) -> Tensor:
    """Ids, the smaller the more frequent: with a skew of 8 a third of them is 0."""
    u = torch.rand(count, generator=torch.Generator().manual_seed(seed + count))
    return (u**skew * vocab).long()


def obeys(
    emulator: emulated.Emulator, ids: Tensor, dy: Tensor, rows: int, start: int, total_dtype: torch.dtype, adds: bool
) -> None:
    """All inputs at the end of their memory; the gradient too, and NaN beforehand where it is overwritten."""
    before = drawn(2, rows, dy.shape[1], dtype=total_dtype) if adds else torch.zeros(rows, dy.shape[1])
    total = emulator.guarded(before if adds else torch.full((rows, dy.shape[1]), torch.nan, dtype=total_dtype))
    version = total._version
    emulator.ops.embedding_gradient_(total, emulator.guarded(dy), emulator.guarded(ids), adds, start, 1000)
    assert total._version > version
    here = (ids >= start) & (ids < start + rows)
    exact = before.double().index_add(0, ids[here] - start, dy[here].double())
    own = before.float().index_add(0, ids[here] - start, dy[here].float()).to(total_dtype)
    close(total, own, exact, "gradient")
    absent = torch.ones(rows, dtype=torch.bool).index_fill(0, ids[here] - start, False)
    assert torch.equal(total[absent], before[absent].to(total_dtype)), "rows without tokens are left alone"


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tokens=TOKENS,
    width=WIDTHS,
    rows=st.integers(1, 60),
    start=st.sampled_from([0, 0, 3, 990]),
    skew=st.sampled_from([1, 8]),
    in_fp32=st.booleans(),
    adds=st.booleans(),
)
def test_obeys_the_rule(
    loaded_emulator: emulated.Emulator,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    rows: int,
    start: int,
    skew: int,
    in_fp32: bool,
    adds: bool,
) -> None:
    ids = tokens_of(tokens, rows + start, skew)
    dy = drawn(1, tokens, width, dtype=dtype)
    obeys(loaded_emulator, ids, dy, rows, start, torch.float32 if in_fp32 else dtype, adds)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    "runs", [[4200, 1, 4099], [31, 33, 64, 32, 1, 95], [32] * 40, [1] * 300 + [512], [16384], [5, 700, 2, 600, 1]]
)
def test_runs_of_any_length_are_exact(emulator: emulated.Emulator, runs: list[int], adds: bool) -> None:
    """Small whole numbers, whose sums are exact in any order: what is lost or counted twice shows."""
    lengths = torch.tensor(runs)
    ids = torch.arange(len(runs)).repeat_interleave(lengths) * 2
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    dy = torch.randint(-3, 4, (len(ids), 6), generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.ones(2 * len(runs), 6) if adds else torch.zeros(2 * len(runs), 6)
    total = emulator.guarded(before if adds else torch.full_like(before, torch.nan))
    emulator.ops.embedding_gradient_(total, dy, ids, adds)
    assert torch.equal(total, before.index_add(0, ids, dy.float()))


def test_launches_do_not_depend_on_the_ids(emulator: emulated.Emulator) -> None:
    """So a CUDA graph may hold them."""
    dy, counts = drawn(1, 1000, 8, dtype=torch.bfloat16), []
    for ids in (torch.zeros(1000).long(), torch.arange(1000), torch.full((1000,), 5000)):
        launched = emulator.launches()
        emulator.ops.embedding_gradient_(torch.zeros(1000, 8), dy, ids, True)
        counts.append(emulator.launches() - launched)
    assert counts == [4, 4, 4], "one of the keys; 1,000 tokens, 64 rows, 4 rows"


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_order_of_warps_gives_the_same_bits(emulator: emulated.Emulator, dtype: torch.dtype) -> None:
    ids, dy = tokens_of(1500, 300, 8), drawn(1, 1500, 132, dtype=dtype)
    results = []
    for seed in range(4):
        emulator.schedule(seed)
        total = drawn(2, 300, 132, dtype=torch.float32)
        emulator.ops.embedding_gradient_(total, dy, ids, True)
        results.append(total)
    assert all(torch.equal(total, results[0]) for total in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [76, 77])
def test_any_layout_gives_the_same_bits(emulator: emulated.Emulator, dtype: torch.dtype, width: int) -> None:
    """Rows that lie apart, by columns or across 16 bytes; what lies between rows of the gradient is left alone."""
    ids, dy = tokens_of(100, 9, 2), drawn(1, 100, width, dtype=dtype)
    expected = torch.full((9, width), torch.nan)
    emulator.ops.embedding_gradient_(expected, dy, ids, False)

    def apart(first: int) -> Tensor:
        return torch.full((100, width + 12), torch.nan, dtype=dtype)[:, first : width + first].copy_(dy)

    for given_dy in (dy, apart(4), apart(3), dy.T.contiguous().T):
        for first in (3, 4):
            home = torch.full((9, width + 12), torch.nan)
            total = home[:, first : width + first]
            emulator.ops.embedding_gradient_(total, given_dy, ids.repeat_interleave(2)[::2], False)
            assert torch.equal(total, expected)
            assert home[:, :first].isnan().all() and home[:, width + first :].isnan().all()
    expanded = torch.zeros(9, width)
    emulator.ops.embedding_gradient_(expanded, dy[:1].expand(100, width), ids, True)
    repeated = torch.zeros(9, width)
    emulator.ops.embedding_gradient_(repeated, dy[:1].repeat(100, 1), ids, True)
    assert torch.equal(expanded, repeated)


def test_offsets_beyond_31_bits(emulator: emulated.Emulator, far: Callable[[Tensor], Tensor]) -> None:
    total, dy = drawn(0, 3, 40, dtype=torch.float32), drawn(1, 4, 40, dtype=torch.bfloat16)
    apart, ids = far(total), torch.tensor([2, 0, 2, 1])
    emulator.ops.embedding_gradient_(apart, far(dy), ids, True)
    emulator.ops.embedding_gradient_(total, dy, ids, True)
    assert torch.equal(apart, total)


def test_shards_are_the_rows_of_the_whole(emulator: emulated.Emulator) -> None:
    """Whole numbers again. Ids of other shards and of no row at all give nothing."""
    ids = torch.cat([tokens_of(700, 90, 2), torch.tensor([-1, -(2**63), 90, 2**40, 2**63 - 1])])
    dy = torch.randint(-3, 4, (705, 5), generator=torch.Generator().manual_seed(1)).float()
    whole = torch.full((90, 5), torch.nan)
    emulator.ops.embedding_gradient_(whole, dy, ids, False)
    assert torch.equal(whole, torch.zeros(90, 5).index_add_(0, ids[:700], dy[:700]))
    for start in (0, 30, 60):
        shard = torch.full((30, 5), torch.nan)
        emulator.ops.embedding_gradient_(shard, dy, ids, False, start, 90)
        assert torch.equal(shard, whole[start : start + 30])


def test_not_a_number_stays_in_its_row(emulator: emulated.Emulator) -> None:
    ids, dy = tokens_of(200, 20, 2), torch.ones(200, 8, dtype=torch.bfloat16)
    dy[(ids == 3).nonzero()[0]] = torch.nan
    total = torch.zeros(20, 8)
    emulator.ops.embedding_gradient_(total, dy, ids, True)
    assert total[3].isnan().all() and not total[torch.arange(20) != 3].isnan().any()


@pytest.mark.parametrize(("tokens", "rows", "width"), [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_empty(emulator: emulated.Emulator, tokens: int, rows: int, width: int) -> None:
    ids, dy = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, width)
    total = torch.full((rows, width), torch.nan)
    emulator.ops.embedding_gradient_(total, dy, ids, True)
    assert total.isnan().all()
    emulator.ops.embedding_gradient_(total, dy, ids, False)
    assert not total.any()


def test_what_cannot_be_is_said(emulator: emulated.Emulator) -> None:
    op = emulator.ops.embedding_gradient_
    total, dy, ids = torch.ones(4, 3), torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"dy is Float \[2, 3\], ids Long \[1\] and the gradient Float \[4, 3\]"):
        op(total, dy, ids[:1], True)
    with pytest.raises(ValueError, match=r"the gradient is Double \[4, 3\]; it can be Float or have the dtype of dy"):
        op(total.double(), dy, ids, True)
    with pytest.raises(ValueError, match="must be neighbours"):
        op(torch.ones(3, 4).T, dy, ids, True)
    with pytest.raises(ValueError, match="rows must not overlap"):
        op(torch.ones(1, 3).expand(5, 3), dy, ids, True)
    with pytest.raises(ValueError, match=r"ids are Int \[2\]; int64 is needed"):
        op(total, dy, ids.int(), True)
    with pytest.raises(ValueError, match="a shard of 4 rows from row -2 on of 9; neither can be negative"):
        op(total, dy, ids, True, -2, 9)
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take fp32, bf16 and fp16"):
        op(total, dy.double(), ids, True)
    assert torch.equal(total, torch.ones(4, 3))


MUTATIONS = {
    "border": ("goes_on = first + kPiece < op.count && ", "goes_on = false && ", "Tensor-likes are not equal"),
    "slot": ("is_first && from_before ? 0", "from_before ? 0", "Tensor-likes are not equal"),
    "bound": ("exists = first + lane < op.count", "exists = true", "illegal access"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated(loaded_emulator: emulated.Emulator, tmp_path: Path, mutation: str) -> None:
    """A run that is cut at a border, goes astray behind it, or is read beyond the list of what crosses borders."""
    before, after, said = MUTATIONS[mutation]
    mutated = emulated.mutated(tmp_path, "embedding", "embedding_runs.h", before, after)
    ids, dy, total = tokens_of(96, 9, 2), torch.ones(96, 4), torch.full((9, 4), torch.nan)
    expected = torch.zeros(9, 4).index_add_(0, ids, dy)
    with pytest.raises((AssertionError, RuntimeError), match=said):
        mutated.ops.embedding_gradient_(total, dy, ids, False)
        torch.testing.assert_close(total, expected, rtol=0, atol=0)
