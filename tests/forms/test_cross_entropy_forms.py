"""The native forms of cross_entropy, whole, in place and in shards: the 2x rule, layouts, infinities, the ignored."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_forms import Form
from rule import close, same
from scored import IGNORE, all_ways, cut, drawn, drawn_for_shards, in_place, in_shards, in_two, obeys, own
from torch import Tensor

DTYPES = {
    "cpu": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "cuda": [torch.float32, torch.bfloat16, torch.float16],
}
VOCABS = {
    # Around lane groups (8 to 32 columns), unrolled pairs of them, and blocks of 4096 columns.
    "cpu": st.integers(1, 140) | st.sampled_from([257, 4095, 4096, 4097, 8191, 9000]),
    # Around a vector of 16 bytes, a warp of one vector each, two warps of eight.
    "cuda": st.integers(1, 40) | st.sampled_from([255, 256, 257, 1031, 2048, 2056, 4099]),
}
WIDTHS = {
    "cpu": st.lists(st.integers(0, 70) | st.sampled_from([4096, 4099]), min_size=1, max_size=8),
    "cuda": st.lists(st.integers(0, 70) | st.sampled_from([2048, 2051]), min_size=1, max_size=5),
}
SMOOTHING = st.sampled_from([0.0, 0.1, 1.0])
Z_LOSS = st.sampled_from([0.0, 1e-2])


def weights(rows: int, dtype: torch.dtype) -> Tensor:
    """Gradients of the losses, in the precision of these."""
    return torch.linspace(-2, 1, rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


@given(
    data=st.data(),
    rows=st.integers(1, 6),
    padding=st.sampled_from([0, 1, 47]),
    smoothing=SMOOTHING,
    z_loss=Z_LOSS,
    weighted=st.booleans(),
)
def test_obeys_the_rule(
    form: Form,
    dtype: torch.dtype,
    data: st.DataObject,
    rows: int,
    padding: int,
    smoothing: float,
    z_loss: float,
    weighted: bool,
) -> None:
    """Every input at the end of its memory; rows of odd lengths begin anywhere within 16 bytes."""
    vocab = data.draw(VOCABS[form.name], "vocab")
    logits, labels = drawn(rows, vocab + padding, vocab, dtype)
    dlosses = form.guarded(weights(rows, dtype)) if weighted else None
    terms = (vocab, smoothing, z_loss, dlosses)
    for way in (in_two, in_place):
        obeys(way(form.ops, form.guarded(logits), form.guarded(labels), *terms), logits, labels, *terms)


@given(
    data=st.data(),
    rows=st.integers(1, 5),
    padding=st.integers(0, 80),
    smoothing=SMOOTHING,
    z_loss=Z_LOSS,
    weighted=st.booleans(),
)
def test_shards_obey_the_rule(
    form: Form,
    dtype: torch.dtype,
    data: st.DataObject,
    rows: int,
    padding: int,
    smoothing: float,
    z_loss: float,
    weighted: bool,
) -> None:
    """Uneven shards, empty ones, and last ones that hold padding alone; labels at the borders."""
    first, *widths = data.draw(WIDTHS[form.name], "widths")
    widths = [first + 1, *widths]
    vocab = max(1, sum(widths) - padding)
    logits, labels = drawn_for_shards(rows, widths, vocab, dtype)
    shards = [form.guarded(shard) for shard in logits.split(widths, 1)]
    terms = (labels, vocab, smoothing, z_loss, weights(rows, dtype) if weighted else None)
    obeys(in_shards(form.ops, shards, *terms), logits, *terms)


def test_any_layout(form: Form, dtype: torch.dtype) -> None:
    """Rows that lie apart: what lies between them is left alone.

    On the CPU the same bits as whole tensors; CUDA's lanes begin where 16 bytes do, and so sum in another order.
    """
    width, terms = 111, (100, 0.1, 1e-3, None)
    logits, labels = drawn(5, width, 100, dtype)
    room = [torch.full((5, width + 20), 7.0, dtype=dtype) for _ in range(3)]
    for home in room[:2]:
        home[:, 3 : width + 3] = logits
    room[2][:, 5:45], room[2][:, 50:121] = logits[:, :40], logits[:, 40:]
    labels_apart = torch.stack([labels, labels], 1)[:, 0]
    results = [
        (in_two(form.ops, room[0][:, 3 : width + 3], labels_apart, *terms), in_two(form.ops, logits, labels, *terms)),
        (
            in_place(form.ops, room[1][:, 3 : width + 3], labels_apart, *terms),
            in_place(form.ops, logits.clone(), labels, *terms),
        ),
        (
            in_shards(form.ops, [room[2][:, 5:45], room[2][:, 50:121]], labels_apart, *terms),
            in_shards(form.ops, cut(logits, [40, 71]), labels, *terms),
        ),
    ]
    for apart, whole in results:
        obeys(apart, logits, labels, *terms)
        assert form.name == "cuda" or same(apart, whole)
    assert all(home[:, :3].eq(7).all() and home[:, 121:].eq(7).all() for home in room)
    assert room[2][:, 45:50].eq(7).all() and all(home[:, width + 3 :].eq(7).all() for home in room[:2])

    column_major = logits.t().contiguous().t()
    assert same(in_two(form.ops, column_major, labels, *terms), results[0][1])
    with pytest.raises(ValueError, match="must be neighbours"):
        in_place(form.ops, column_major, labels, *terms)
    with pytest.raises(ValueError, match="must be neighbours"):
        in_shards(form.ops, [column_major], labels, *terms)
    with pytest.raises(ValueError, match="must not overlap"):
        in_place(form.ops, logits[:1].expand(5, width), labels, *terms)


def test_offsets_beyond_31_bits(form: Form, far: Callable[[Tensor], Tensor]) -> None:
    logits, labels = drawn(3, 64, 64, torch.bfloat16)
    terms = (labels, 64, 0.1, 1e-3, None)
    assert same(in_two(form.ops, far(logits), *terms), in_two(form.ops, logits, *terms))
    assert same(in_place(form.ops, far(logits), *terms), in_place(form.ops, logits.clone(), *terms))
    assert same(in_shards(form.ops, [far(logits)], *terms), in_shards(form.ops, [logits.clone()], *terms))


def test_confident_rows_keep_their_digits(form: Form) -> None:
    """Small losses among logits of a million, whose last place is worth more than the loss: lse - x_label is noise.

    What remains is the sum: up to vocab / 8 terms a lane, half an ulp of 1 each. Gradients are as good where they are
    made with the losses; a backward that starts from lse has its rounding.
    """
    vocab, rows = 5000, torch.arange(4)
    above = torch.tensor([18.0, 20.0, 22.0, 24.0], dtype=torch.float64)
    exact = torch.log1p((vocab - 1) * torch.exp(-above))
    for dtype in set(DTYPES[form.name]) & {torch.float32, torch.float64}:
        logits, labels = torch.full((4, vocab), 1e6, dtype=dtype), torch.tensor([0, 17, 4096, 4999])
        logits[rows, labels] += above.to(dtype)
        tolerance = vocab / 16 * torch.finfo(dtype).eps
        two, place, shards = all_ways(form.ops, logits, labels, vocab, 0.0, 0.0, None)
        assert all((losses - exact).abs().max() <= tolerance for losses in (two[0], place[0], shards[0]))
        assert (place[1][rows, labels] - torch.expm1(-exact)).abs().max() <= tolerance


def test_infinities(form: Form, dtype: torch.dtype) -> None:
    """Masked columns (-inf) have no probability; NaN and +inf poison their own row, in every shard, and no other."""
    vocab = 9000
    logits, _ = drawn(6, vocab, vocab, dtype)
    labels = torch.tensor([8999, 5, 6, 7, 8, 9])
    logits[0, :8500] = -torch.inf  # the first two blocks of the CPU's hold nothing else, nor does the first shard
    logits[1, 1000:] = -torch.inf
    logits[2, 8000] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    upstream = torch.ones(6)
    exact, torchs = (own(x, labels, vocab, 0.0, 0.0, upstream) for x in (logits.double(), logits))
    assert form.ops.cross_entropy(logits, labels, IGNORE, 0.0, 0.0, vocab)[1][2:4].isnan().all()
    for losses, gradient in all_ways(form.ops, logits, labels, vocab, 0.0, 0.0, None):
        for row in (0, 1, 5):
            close(losses[row], torchs[0][row], exact[0][row], f"loss of row {row}")
            close(gradient[row], torchs[1][row], exact[1][row], f"gradient of row {row}")
        assert losses[2:5].isnan().all() and gradient[2].isnan().all() and gradient[4].isnan().all()
        assert not gradient[0, :8500].any() and not gradient[1, 1000:].any()


def test_certainty_costs_nothing(form: Form, dtype: torch.dtype) -> None:
    """exp(0) is 1: a loss below 0, or a gradient where there is nothing to learn, would be the exponential's error."""
    logits, labels = torch.tensor([[3.0, -torch.inf], [-70.0, -torch.inf]], dtype=dtype), torch.tensor([0, 0])
    for losses, gradient in all_ways(form.ops, logits, labels, 2, 0.0, 0.0, None):
        assert not losses.any() and not gradient.any()


def test_ignored_rows_are_not_read(form: Form) -> None:
    logits, labels = torch.full((3, 40), torch.nan), torch.tensor([IGNORE, 1, IGNORE])
    logits[1] = 0.0
    for losses, gradient in all_ways(form.ops, logits, labels, 40, 0.1, 1e-3, None):
        assert not losses[[0, 2]].any() and not gradient[[0, 2]].any() and gradient[1].any() and losses[1] > 0
    other = labels.where(labels != IGNORE, 7)
    assert form.ops.cross_entropy(logits, other, 7, 0.0, 0.0, 40)[0][[0, 2]].eq(0).all()


@pytest.mark.parametrize(("rows", "width"), [(0, 12), (3, 0)])
def test_empty(form: Form, rows: int, width: int) -> None:
    labels = torch.zeros(rows, dtype=torch.int64)
    stats = form.ops.cross_entropy_local(torch.empty(rows, width), labels, 5, 30, IGNORE, False)
    assert stats.tolist() == [[-torch.inf, 0.0, 0.0]] * rows
    form.ops.cross_entropy_local_backward_(
        torch.empty(rows, width), labels, torch.ones(rows), None, 5, 30, IGNORE, 0.0, 0.0
    )
    if width:
        for way in (in_two, in_place):
            losses, gradient = way(form.ops, torch.empty(0, width), labels, 10, 0.1, 0.0, None)
            assert losses.shape == (0,) and gradient.shape == (0, width)


def test_a_write_in_place_raises_the_version(form: Form) -> None:
    logits, labels = drawn(3, 12, 12, torch.float32)
    before = logits._version
    in_place(form.ops, logits, labels, 12, 0.0, 0.0, None)
    between = logits._version
    in_shards(form.ops, [logits], labels, 12, 0.0, 0.0, None)
    assert before < between < logits._version
