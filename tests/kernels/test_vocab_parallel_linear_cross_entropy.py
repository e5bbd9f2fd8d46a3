"""Linear + cross-entropy over shards of the vocabulary, against torch's own over the whole, by the 2x rule.

The ranks are threads, except where gloo carries the statistics between processes.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import RankError, RunOn
from rule import close, run, same
from simulated_ranks import Arriving, Gather, run_threads
from sink import Sink
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels
from megapre.kernels import linear_cross_entropy, vocab_parallel_linear_cross_entropy

OP = "vocab_parallel_linear_cross_entropy"
DTYPES = [torch.float32, torch.bfloat16]
IGNORE = -100
Op = Callable[..., Any]


class Problem(NamedTuple):
    """x, the whole weight with its padding, labels, and how many rows of the weight exist."""

    x: Tensor
    weight: Tensor
    labels: Tensor
    vocab: int


def problem(
    rows: int, hidden: int, columns: int, vocab: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator).to(device, dtype)
    weight = torch.randn(columns, hidden, generator=generator).to(device, dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = IGNORE
    return Problem(x, weight, labels.to(device), vocab)


class Result(NamedTuple):
    """What all ranks together computed: dx is the sum of the `shares`."""

    loss: Tensor
    losses: Tensor
    dx: Tensor
    dweight: Tensor
    shares: list[Tensor]


def sharded(op: Op, given: Problem, ranks: int, *terms: float, factor: float = 1.0) -> Result:
    """The op on `ranks` shards, its loss times `factor` differentiated."""
    shards = given.weight.chunk(ranks)
    assert len(shards) == ranks and len({len(shard) for shard in shards}) == 1

    def of(rank: int, gather: Gather) -> list[Tensor]:
        x, weight = given.x.clone().requires_grad_(), shards[rank].clone().requires_grad_()
        start = rank * len(weight)
        loss, losses = op(x, weight, given.labels, gather, start, given.vocab, IGNORE, *terms, return_losses=True)
        assert not losses.requires_grad
        return [loss.detach(), losses, *torch.autograd.grad(loss * factor, (x, weight))]

    loss, losses, shares, dweights = (list(parts) for parts in zip(*run_threads(ranks, of), strict=True))
    assert same(loss[1:], loss[:-1]) and same(losses[1:], losses[:-1]), "ranks disagree"
    dx = torch.stack([share.double() for share in shares]).sum(0).to(given.x.dtype)
    return Result(loss[0], losses[0], dx, torch.cat(dweights), shares)


def own(given: Problem, smoothing: float, z_loss: float, dtype: torch.dtype) -> list[Tensor]:
    """Loss, losses, dx and dW of torch's own ops on the whole, computed in `dtype`."""
    kept: list[Tensor] = []

    def whole(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)[:, : given.vocab]
        logits = logits if dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(
            logits, given.labels, ignore_index=IGNORE, label_smoothing=smoothing, reduction="none"
        ) + (z_loss * logits.logsumexp(-1).square()).where(given.labels != IGNORE, 0.0)
        kept.append(losses.detach())
        return losses.sum()

    x, weight = (t.to(dtype).requires_grad_() for t in (given.x.clone(), given.weight.clone()))
    loss = whole(x, weight)
    return [loss.detach(), kept[0], *torch.autograd.grad(loss, (x, weight))]


def obeys_the_rule(result: Result, given: Problem, smoothing: float, z_loss: float) -> None:
    torchs, exact = own(given, smoothing, z_loss, given.x.dtype), own(given, smoothing, z_loss, torch.float64)
    assert result.loss.dtype == torch.float32
    # Each rank rounds its share of dx to the dtype before they are added.
    ulps = torch.finfo(given.x.dtype).eps * sum(float(s.abs().max()) for s in result.shares if s.numel())
    slack = {"dx": ulps if len(result.shares) > 1 else 0.0}
    for name, t, e in zip(("loss", "losses", "dx", "dweight"), torchs, exact, strict=True):
        close(getattr(result, name), t, e, name, slack.get(name, 0.0))
    assert not result.dweight[given.vocab :].any(), "padding has a gradient"
    assert not result.losses[given.labels == IGNORE].any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(0, 9),
    hidden=st.integers(1, 33),
    ranks=st.integers(1, 4),
    height=st.integers(1, 40),
    padding=st.integers(0, 90),
    smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-3]),
)
def test_obeys_the_rule(
    device: str,
    implementation: str,
    dtype: torch.dtype,
    rows: int,
    hidden: int,
    ranks: int,
    height: int,
    padding: int,
    smoothing: float,
    z_loss: float,
) -> None:
    """Shards with some padding, with nothing else, without a label, and all of them in one."""
    op = kernels.choose(device, {OP: implementation}).vocab_parallel_linear_cross_entropy
    vocab = max(ranks * height - padding, 1)
    given = problem(rows, hidden, ranks * height, vocab, dtype, device, seed=rows * 41 + padding)
    obeys_the_rule(sharded(op, given, ranks, smoothing, z_loss), given, smoothing, z_loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_many_chunks(device: str, dtype: torch.dtype, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five chunks of two parts, the same bits each time, and of the reference's values."""
    monkeypatch.setattr(vocab_parallel_linear_cross_entropy, "MAX_LOGITS", {device: 1})
    assert linear_cross_entropy.chunk_rows(1100, 16, 1) == 220
    op = kernels.choose(device).vocab_parallel_linear_cross_entropy
    given = problem(1100, 24, 64, 59, dtype, device, seed=1)
    first, second = (sharded(op, given, ranks, 0.1, 1e-3) for _ in range(2))
    obeys_the_rule(first, given, 0.1, 1e-3)
    assert same(first[:4], second[:4])
    twice = sharded(op, given, ranks, 0.1, 1e-3, factor=2.0)
    assert same([twice.dx.float(), twice.dweight.float()], [2 * first.dx.float(), 2 * first.dweight.float()])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise_for_a_number_of_threads(threads: int) -> None:
    op = kernels.choose("cpu").vocab_parallel_linear_cross_entropy
    given = problem(300, 64, 2000, 1990, torch.bfloat16, "cpu")
    torch.set_num_threads(threads)
    try:
        first, second = (sharded(op, given, 1, 0.1, 1e-3) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert same(first[:4], second[:4])


def test_one_shard_is_the_op_of_a_single_rank(device: str, implementation: str) -> None:
    ops = kernels.choose(device, {OP: implementation})
    given = problem(9, 12, 40, 37, torch.float32, device)
    result = sharded(ops.vocab_parallel_linear_cross_entropy, given, 1, 0.1, 1e-3)
    value, grads = run(
        lambda x, w: ops.linear_cross_entropy(x, w, given.labels, IGNORE, 0.1, 1e-3, given.vocab),
        [given.x, given.weight],
    )
    upstream = torch.randint(-2, 3, (), generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(result.loss, value[0])
    torch.testing.assert_close([result.dx * upstream, result.dweight * upstream], grads)


@pytest.mark.parametrize("owner", [0, 2])
def test_labels_that_one_shard_owns_alone(device: str, implementation: str, owner: int) -> None:
    """The others' gradients are those of columns that are not the label; the last shard is padding alone."""
    op = kernels.choose(device, {OP: implementation}).vocab_parallel_linear_cross_entropy
    x, weight, labels, vocab = problem(12, 8, 40, 29, torch.float32, device, seed=3)
    labels = (labels % 9 + 10 * owner).where(labels != IGNORE, IGNORE)
    given = Problem(x, weight, labels, vocab)
    result = sharded(op, given, 4, 0.0, 0.0)
    obeys_the_rule(result, given, 0.0, 0.0)
    assert not result.dweight[30:].any() and not result.shares[3].any()


def test_shards_without_probability(device: str, implementation: str) -> None:
    """Logits of -inf throughout a shard, in some rows or in all, and in every shard but the label's column."""
    op = kernels.choose(device, {OP: implementation}).vocab_parallel_linear_cross_entropy
    x = torch.tensor([[1.0], [1.0], [2.0]], device=device)
    weight = torch.full((12, 1), -torch.inf, device=device)
    labels = torch.tensor([5, 5, 5], device=device)
    for exist in ([4, 5, 6], [5]):
        weight[exist] = torch.linspace(-1, 1, len(exist), device=device).unsqueeze(1)

        def of(rank: int, gather: Gather) -> list[Tensor]:
            shard = weight.chunk(3)[rank].clone().requires_grad_()
            loss = op(x, shard, labels, gather, 4 * rank, 12)
            return [loss.detach(), *torch.autograd.grad(loss, shard)]

        results = run_threads(3, of)
        torch.testing.assert_close(results[0][0], F.cross_entropy(x @ weight.T, labels, reduction="sum"))
        dweight = torch.cat([result[1] for result in results])
        assert dweight.isfinite().all() and not dweight[[0, 1, 2, 3, 7, 8, 9, 10, 11]].any()
        weight[:] = -torch.inf


def test_only_the_wanted_gradients_are_made(device: str, implementation: str) -> None:
    op = kernels.choose(device, {OP: implementation}).vocab_parallel_linear_cross_entropy
    given = problem(9, 8, 20, 19, torch.float32, device, seed=2)
    both = sharded(op, given, 2)
    calls: list[int] = []

    def of(rank: int, gather: Gather) -> list[Tensor]:
        def counted(stats: Tensor) -> Any:
            calls.append(rank)
            return gather(stats)

        x, weight = given.x.clone(), given.weight.chunk(2)[rank].clone()
        arguments = (given.labels, counted, 10 * rank, 19)
        (dx,) = torch.autograd.grad(op(leaf := x.clone().requires_grad_(), weight, *arguments), leaf)
        (dweight,) = torch.autograd.grad(op(x, leaf := weight.clone().requires_grad_(), *arguments), leaf)
        with torch.no_grad():
            loss = op(x, leaf, *arguments)
        assert not loss.requires_grad and not op(x, weight, *arguments).requires_grad
        return [dx, dweight, loss]

    results = run_threads(2, of)
    assert same([r[0] for r in results], both.shares) and torch.equal(torch.cat([r[1] for r in results]), both.dweight)
    assert torch.equal(results[0][2], both.loss)
    assert calls.count(0) == calls.count(1), "every call takes part in the same collectives"


def test_work_goes_on_while_statistics_travel() -> None:
    op, events = kernels.choose("cpu").vocab_parallel_linear_cross_entropy, []

    class Slow:
        def __init__(self, stats: Tensor) -> None:
            self.stats, self.number = stats, sum(event.startswith("begin") for event in events)
            events.append(f"begin {self.number}")

        def wait(self) -> Tensor:
            events.append(f"end {self.number}")
            return self.stats.unsqueeze(0)

    given = problem(7, 4, 6, 6, torch.float32, "cpu")
    op(given.x, given.weight, given.labels, Slow, 0, 6)
    assert events == ["begin 0", "begin 1", "end 0", "end 1"]


@pytest.mark.parametrize("total_dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_goes_into_the_sink(total_dtype: torch.dtype) -> None:
    op = kernels.choose("cpu").vocab_parallel_linear_cross_entropy
    upstream, height = torch.tensor(0.125), 6
    steps = [problem(5, 6, 12, 10, torch.bfloat16, "cpu", seed=1)]
    steps.append(problem(5, 6, 12, 10, torch.bfloat16, "cpu", seed=2)._replace(weight=steps[0].weight))
    expected = sum(sharded(op, step, 2, factor=0.125).dweight.double() for step in steps)
    sinks = [Sink(torch.empty(height, 6), total_dtype) for _ in range(2)]

    def of(rank: int, gather: Gather) -> list[Tensor]:
        weight = torch.nn.Parameter(steps[0].weight.chunk(2)[rank].clone())
        sink = weight.gradient_sink = sinks[rank]  # type: ignore[attr-defined]
        shares = []
        for step in steps:
            x = step.x.clone().requires_grad_()
            op(x, weight, step.labels, gather, height * rank, 10, upstream=upstream).backward(upstream)
            assert x.grad is not None
            shares.append(x.grad)
        assert weight.grad is None and sink.calls == sink.done == len(steps)
        return shares

    shares = run_threads(2, of)
    for at, step in enumerate(steps):
        for rank, share in enumerate(sharded(op, step, 2, factor=0.125).shares):
            torch.testing.assert_close(shares[rank][at], share)
    total = torch.cat([sink.total for sink in sinks]).double()
    # Of each step a rounding of logits' gradients and of the sum, in bf16.
    torch.testing.assert_close(total, expected, atol=4 * 2**-8 * float(expected.abs().max()), rtol=0)
    assert not total[10:].any()


def test_a_broken_promise_of_the_upstream_gradient_is_an_error() -> None:
    op = kernels.choose("cpu").vocab_parallel_linear_cross_entropy
    weight = torch.nn.Parameter(torch.ones(4, 3))
    weight.gradient_sink = Sink(weight, torch.float32)  # type: ignore[attr-defined]
    x, labels = torch.ones(2, 3, requires_grad=True), torch.tensor([1, 2])
    loss = op(x, weight, labels, lambda stats: stats.unsqueeze(0), 0, 4, upstream=torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"made for upstream = 0\.5, and the backward brings 1\.0"):
        loss.backward()


def test_takes_fp32_weights_beside_bf16_activations(device: str) -> None:
    op = kernels.choose(device).vocab_parallel_linear_cross_entropy
    given = problem(6, 8, 12, 12, torch.bfloat16, device)
    x, weight = given.x.clone().requires_grad_(), given.weight.float().requires_grad_()
    loss = op(x, weight, given.labels, lambda stats: stats.unsqueeze(0), 0, 12)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    plain = sharded(op, given, 1)
    assert same([loss.detach(), dx, dweight.bfloat16()], [plain.loss, plain.dx, plain.dweight])


def test_errors_have_numbers(device: str, implementation: str) -> None:
    op = kernels.choose(device, {OP: implementation}).vocab_parallel_linear_cross_entropy
    x, weight = torch.ones(3, 4, device=device), torch.ones(5, 4, device=device, requires_grad=True)
    labels, asked = torch.zeros(3, dtype=torch.int64, device=device), []

    def alone(stats: Tensor) -> Tensor:
        asked.append(stats)
        return stats.unsqueeze(0)

    with pytest.raises(ValueError, match=r"x \[T, H\] and weight \[V/R, H\]; they are \(3, 4\) and \(5, 3\)"):
        op(x, weight[:, :3], labels, alone, 0, 5)
    with pytest.raises(ValueError, match=r"labels are \(2,\); x \(3, 4\) needs \[3\]"):
        op(x, weight, labels[:2], alone, 0, 5)
    with pytest.raises(ValueError, match="a shard of 5 rows from row 6 on of 11; every rank needs as many rows"):
        op(x, weight, labels, alone, 6, 11)
    if device == "cpu":
        with pytest.raises(ValueError, match="label 9 of row 1 "):
            op(x, weight, torch.tensor([0, 9, IGNORE]), alone, 0, 9)
    assert not asked, "the other ranks would wait for a rank that has failed"
    with pytest.raises(ValueError, match=r"statistics of 1 shards; with 5 rows each they hold less than .* of 9"):
        op(x, weight, labels, alone, 0, 9)
    with pytest.raises(ValueError, match=r"stats are .*; \[ranks, \d, 3\] is needed"):
        op(x, weight, labels, lambda stats: stats.expand(5, *stats.shape)[..., :2], 0, 9)


def test_a_failing_rank_ends_the_others() -> None:
    op = kernels.choose("cpu").vocab_parallel_linear_cross_entropy
    given = problem(4, 3, 8, 8, torch.float32, "cpu")

    def of(rank: int, gather: Gather) -> Tensor:
        if rank == 1:
            raise OverflowError("out of everything")
        return op(given.x, given.weight[:4], given.labels, gather, 0, 8)  # type: ignore[no-any-return]

    begun = time.monotonic()
    with pytest.raises(OverflowError, match="out of everything"):
        run_threads(2, of)
    assert time.monotonic() - begun < 10


# Between processes, over gloo


def across() -> Problem:
    return problem(30, 16, 48, 45, torch.float32, "cpu")


def of_this_rank() -> list[Tensor]:
    """Loss, losses, the whole gradient of x, and that of this rank's rows of the weight."""
    given, rank, ranks = across(), dist.get_rank(), dist.get_world_size()

    def gather(stats: Tensor) -> Arriving:
        out = stats.new_empty(ranks, *stats.shape)
        work = dist.all_gather_into_tensor(out.flatten(0, 1), stats, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out

        return Arriving(wait)

    op = kernels.choose("cpu").vocab_parallel_linear_cross_entropy
    x, weight = given.x.requires_grad_(), given.weight.chunk(ranks)[rank].clone().requires_grad_()
    columns = rank * len(weight), given.vocab
    loss, losses = op(x, weight, given.labels, gather, *columns, IGNORE, 0.1, 1e-3, return_losses=True)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    dist.all_reduce(dx)
    return [loss.detach(), losses, dx, dweight]


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes(run_on: RunOn, ranks: int) -> None:
    results = run_on(ranks, of_this_rank)
    for other in results[1:]:
        assert same(other[:3], results[0][:3]), "ranks disagree"
    found = [*results[0][:3], torch.cat([result[3] for result in results])]
    torchs, exact = (own(across(), 0.1, 1e-3, dtype) for dtype in (torch.float32, torch.float64))
    for name, g, t, e in zip(("loss", "losses", "dx", "dweight"), found, torchs, exact, strict=True):
        close(g, t, e, name)


def gather_with_one_rank_less() -> None:
    if dist.get_rank() == 1:
        raise OverflowError("out of everything")
    of_this_rank()


def test_a_process_that_fails_leaves_nobody_waiting(run_on: RunOn) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed:(.|\n)*out of everything"):
        run_on(2, gather_with_one_rank_less)
