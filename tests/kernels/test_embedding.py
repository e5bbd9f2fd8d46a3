"""The embedding against torch's own, by the 2x rule; sums of frequent tokens; gradients into sinks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import run, same, twice
from sink import Sink
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels

OP = "embedding"


def drawn(seed: int, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(tokens=st.integers(0, 60), rows=st.integers(1, 20), width=st.integers(1, 70))
def test_obeys_the_rule(
    device: str, implementation: str, dtype: torch.dtype, tokens: int, rows: int, width: int
) -> None:
    op = kernels.choose(device, {OP: implementation}).embedding
    ids = torch.randint(rows, (2, tokens), generator=torch.Generator().manual_seed(tokens)).to(device)
    weight = drawn(1, rows, width, dtype=dtype, device=device)
    twice(lambda w: op(ids, w), lambda w: F.embedding(ids, w), [weight])


@pytest.mark.parametrize("name", ["summed", "reference"])
def test_the_gradient_of_a_frequent_token_is_exact_in_bf16(name: str) -> None:
    """torch's own CPU kernel adds 1,000 ones to 256 in bf16."""
    ids = torch.tensor([3] * 1000 + [5, 0, 5] + [9] * 300).view(1, -1)
    weight = drawn(2, 12, 64, dtype=torch.bfloat16, device="cpu").requires_grad_()
    grad = drawn(1, 1, 1303, 64, dtype=torch.bfloat16, device="cpu") + 1
    out = kernels.choose("cpu", {OP: name}).embedding(ids, weight)
    assert torch.equal(out, weight[ids])
    out.backward(grad)
    exact = torch.zeros(12, 64, dtype=torch.float64).index_add_(0, ids[0], grad[0].double())
    assert weight.grad is not None
    # One rounding to bf16, half an ulp.
    torch.testing.assert_close(weight.grad.double(), exact, rtol=2**-8, atol=0)
    assert weight.grad[3].min() > 800


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_land_in_sinks(dtype: torch.dtype) -> None:
    op = kernels.choose("cpu").embedding
    weight = torch.nn.Parameter(drawn(1, 9, 6, dtype=dtype, device="cpu"))
    sink = weight.gradient_sink = Sink(weight, torch.float32)  # type: ignore[attr-defined]
    expected = torch.zeros(9, 6)
    for step in range(3):
        ids = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(step))
        dy = drawn(step, 2, 5, 6, dtype=dtype, device="cpu")
        op(ids, weight).backward(dy)
        expected.index_add_(0, ids.flatten(), dy.reshape(-1, 6).float())
    assert weight.grad is None and sink.calls == sink.done == 3
    torch.testing.assert_close(sink.total, expected)


def test_an_id_beyond_the_table_is_an_error(implementation: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("CUDA stops the process")
    op = kernels.choose(device, {OP: implementation}).embedding
    with pytest.raises(IndexError):
        op(torch.tensor([1, 4]), torch.ones(4, 3))


# Shards of the vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    tokens=st.integers(0, 40), heights=st.lists(st.integers(1, 12), min_size=1, max_size=4), width=st.integers(1, 40)
)
def test_shards_add_up_to_the_whole(
    device: str, implementation: str, dtype: torch.dtype, tokens: int, heights: list[int], width: int
) -> None:
    """Every token is in one shard: zeros of the others change no bit, and each shard has its rows of the gradient."""
    op = kernels.choose(device, {OP: implementation}).embedding
    rows = sum(heights)
    ids = torch.randint(rows, (2, tokens), generator=torch.Generator().manual_seed(tokens)).to(device)
    weight = drawn(1, rows, width, dtype=dtype, device=device)
    outputs, gradients = run(lambda w: op(ids, w), [weight])
    starts = [sum(heights[:rank]) for rank in range(len(heights))]
    shards = list(zip(weight.split(heights), starts, strict=True))
    found = [run(lambda w, start=start: op(ids, w, start, rows), [shard]) for shard, start in shards]
    total = torch.stack([y for (y,), _ in found]).sum(0)
    assert same([total, torch.cat([dweight for _, (dweight,) in found])], [outputs[0], gradients[0]])
    for (shard, start), ((y,), _) in zip(shards, found, strict=True):
        assert not y[(ids < start) | (ids >= start + len(shard))].any()


@pytest.mark.parametrize("start", [0, 3, 40])
def test_nan_stays_in_its_shard(device: str, implementation: str, start: int) -> None:
    """A row of NaN that no token here names is not read, and a gradient of NaN that belongs elsewhere not added."""
    op = kernels.choose(device, {OP: implementation}).embedding
    weight = drawn(1, 4, 6, dtype=torch.float32, device=device)
    weight[0] = torch.nan
    ids = torch.tensor([start + 1, 7, 39, 11, start + 3], device=device)
    y = op(ids, leaf := weight.requires_grad_(), start, 50)
    dy = torch.ones_like(y)
    dy[1:4] = torch.nan
    (dweight,) = torch.autograd.grad(y, leaf, dy)
    assert y.isfinite().all() and not y[1:4].any()
    assert torch.equal(dweight.cpu(), torch.tensor([0.0, 1.0, 0.0, 1.0]).unsqueeze(1).expand(4, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_a_shard_land_in_its_sink(dtype: torch.dtype) -> None:
    op = kernels.choose("cpu").embedding
    weight = torch.nn.Parameter(drawn(1, 3, 6, dtype=dtype, device="cpu"))
    sink = weight.gradient_sink = Sink(weight, dtype)  # type: ignore[attr-defined]
    expected = torch.zeros(9, 6)
    for step in range(3):
        ids = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(step))
        dy = torch.randint(-3, 4, (2, 5, 6), generator=torch.Generator().manual_seed(step)).to(dtype)
        op(ids, weight, 3, 9).backward(dy)
        expected.index_add_(0, ids.flatten(), dy.reshape(-1, 6).float())
    assert weight.grad is None and sink.calls == sink.done == 3
    assert torch.equal(sink.total.float(), expected[3:6])


def test_an_id_beyond_the_whole_vocabulary_is_an_error(implementation: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("looking would make the host wait")
    op = kernels.choose(device, {OP: implementation}).embedding
    for bad in (-1, 12):
        with pytest.raises(IndexError, match=rf"id {bad} of token 1 lies outside \[0, 12\)"):
            op(torch.tensor([1, bad]), torch.ones(4, 3), 4, 12)
    with pytest.raises(IndexError, match=r"id 8 of token 0 lies outside \[0, 8\)"):
        op(torch.tensor([8]), torch.ones(4, 3), 4)
    with pytest.raises(ValueError, match="a shard of 4 rows from row -1 on of 12; neither can be negative"):
        op(torch.tensor([1]), torch.ones(4, 3), -1, 12)
