"""Cross-entropy: in place and not, padded columns, ignored and strided rows, bad labels, cut over ranks, fused."""

import pytest
import torch
from rule import close, run, same, twice
from sink import Sink
from torch import Tensor

from megapre.kernels import cross_entropy as plain
from megapre.kernels import linear_cross_entropy as plain_linear
from megapre.kernels import vocab_parallel as plain_halves
from megapre.kernels import vocab_parallel_linear_cross_entropy as plain_sharded
from megapre.kernels.triton import cross_entropy, linear_cross_entropy, ops, vocab_parallel

SETTINGS = [(-100, 0.0, 0.0), (3, 0.1, 1e-3)]


def inputs(rows: int, columns: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (torch.randn(rows, columns, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::3] = -100
    logits[:, vocab:] = float("nan")  # columns that do not exist may hold anything
    return logits.to(device), labels.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns, vocab", [(1, 1, 1), (4, 100, 100), (5, 5000, 4990), (3, 20000, 19999)])
@pytest.mark.parametrize("ignore, smoothing, z_loss", SETTINGS)
def test_losses_and_gradients_obey_the_rule(
    device: str, dtype: torch.dtype, rows: int, columns: int, vocab: int, ignore: int, smoothing: float, z_loss: float
) -> None:
    logits, labels = inputs(rows, columns, vocab, dtype, device)
    labels = labels.where(labels != -100, ignore)
    settings = (ignore, smoothing, z_loss, vocab)
    twice(lambda x: ops.cross_entropy(x, labels, *settings), lambda x: plain.reference(x, labels, *settings), [logits])
    # In place, with rows further apart than they are long.
    whole = torch.full((rows, columns + 16), 7.0, dtype=dtype, device=device)
    strided = whole[:, :columns]
    strided.copy_(logits)
    upstream = torch.randint(-2, 3, (rows,), generator=torch.Generator().manual_seed(0)).float().to(device)
    losses = cross_entropy.forward_in_place(strided, labels, upstream, *settings)
    outputs, grads = run(lambda x: ops.cross_entropy(x, labels, *settings), [logits])
    torch.testing.assert_close(losses, outputs[0])
    torch.testing.assert_close(strided, grads[0])
    assert bool((whole[:, columns:] == 7.0).all())
    assert bool((strided[:, vocab:] == 0).all())


def test_a_long_row_is_walked_in_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "policy", lambda columns, size: (64, 16 // size, 1))
    for columns, vocab in ((64, 64), (65, 65), (1000, 990), (640, 130), (640, 64), (64, 1)):
        logits, labels = inputs(3, columns, vocab, torch.bfloat16, device)
        settings = (-100, 0.1, 1e-3, vocab)
        twice(lambda x, s=settings, y=labels: ops.cross_entropy(x, y, *s),
              lambda x, s=settings, y=labels: plain.reference(x, y, *s), [logits])  # fmt: skip
        first, second = logits.clone(), logits.clone()
        assert same([cross_entropy.forward_in_place(first, labels, None, *settings), first],
                    [cross_entropy.forward_in_place(second, labels, None, *settings), second])  # fmt: skip


def test_masked_logits_large_logits_and_bad_labels(device: str) -> None:
    logits = torch.full((4, 40), float("-inf"), device=device)
    logits[:, 7] = 30000.0
    logits[1, 8] = 29999.0
    labels = torch.tensor([7, 8, 40, -1], device=device)
    losses = ops.cross_entropy(logits, labels)
    exact = plain.reference(logits[:2].double(), labels[:2])
    torch.testing.assert_close(losses[:2].double(), exact, rtol=1e-6, atol=1e-12)
    assert bool(losses[2:].isnan().all())
    cross_entropy.forward_in_place(logits, labels, None, -100, 0.0, 0.0, 40)
    assert bool(logits[2:].isnan().all())
    assert not bool(logits[:2].isnan().any())


def test_no_rows(device: str) -> None:
    losses = ops.cross_entropy(torch.empty(0, 9, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert losses.shape == (0,)


@pytest.mark.parametrize("ignore, smoothing, z_loss", SETTINGS)
def test_the_vocabulary_cut_over_ranks(device: str, ignore: int, smoothing: float, z_loss: float) -> None:
    """Three ranks of 100 columns, half of one and all of another padding: losses and gradients of the whole."""
    vocab = 150
    logits, labels = inputs(7, 300, vocab, torch.bfloat16, device)
    labels = labels.where(labels != -100, ignore)
    parts = [logits[:, at : at + 100].contiguous() for at in (0, 100, 200)]
    gathered = torch.stack(
        [vocab_parallel.local(p, labels, 100 * r, vocab, ignore, smoothing != 0) for r, p in enumerate(parts)]
    )
    own = [plain_halves.local_reference(p, labels, 100 * r, vocab, ignore, smoothing != 0) for r, p in enumerate(parts)]
    torch.testing.assert_close(gathered, torch.stack(own))
    losses, lse = vocab_parallel.merge(gathered, labels, vocab, ignore, smoothing, z_loss)
    torch.testing.assert_close((losses, lse), plain_halves.merge(gathered, labels, vocab, ignore, smoothing, z_loss))
    upstream = torch.randint(-2, 3, (7,), generator=torch.Generator().manual_seed(0)).float().to(device)
    for r, p in enumerate(parts):
        vocab_parallel.gradient_(p, labels, lse, upstream, 100 * r, vocab, ignore, smoothing, z_loss)
    settings = (ignore, smoothing, z_loss, vocab)
    outputs, whole = run(lambda x: ops.cross_entropy(x, labels, *settings), [logits])
    torch.testing.assert_close(losses, outputs[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole[0])


def test_shards_without_probability(device: str) -> None:
    """Statistics of -inf in one shard, rows that are ignored, and statistics that do not fit."""
    stats = torch.tensor([[-torch.inf, 0.0, 0.0], [1.0, 2.0, 0.5]], device=device)
    labels = torch.tensor([3, 3], device=device)
    got = vocab_parallel.merge(stats.view(2, 1, 3), labels[:1], 8, -100, 0.0, 0.0)
    torch.testing.assert_close(got, plain_halves.merge(stats.view(2, 1, 3), labels[:1], 8, -100))
    nothing = torch.zeros(2, 2, 3, device=device)
    assert not any(t.any() for t in vocab_parallel.merge(nothing, torch.full_like(labels, -7), 8, -7, 0.0, 1e-3))
    with pytest.raises(ValueError, match=r"stats are \(2, 2, 3\); \[ranks, 2, 4\] is needed"):
        vocab_parallel.merge(nothing, labels, 8, -100, 0.1, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-3)])
def test_linear_cross_entropy_over_shards(
    device: str, dtype: torch.dtype, smoothing: float, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three ranks in turn, in two chunks, with the others' statistics from the definition."""
    monkeypatch.setattr(plain_linear, "chunk_rows", lambda count, vocab, most: 12)
    x, weight, labels = _linear_inputs(device, dtype)
    shards = weight.chunk(3)
    terms = (-100, smoothing, z_loss)
    got, own = [], []
    for op, found in ((ops.vocab_parallel_linear_cross_entropy, got), (plain_sharded.reference, own)):
        shares = torch.zeros_like(x, dtype=torch.float32)
        for rank, shard in enumerate(shards):
            done = 0

            def gather(stats: Tensor, rank: int = rank) -> Tensor:
                nonlocal done
                rows = slice(done, done := done + len(stats))
                others = [
                    plain_halves.local_reference(x[rows] @ other.T, labels[rows], 16 * r, 40, -100, smoothing != 0)
                    for r, other in enumerate(shards)
                ]
                torch.testing.assert_close(stats, others[rank].to(stats.dtype), rtol=2e-2, atol=2e-2)
                return torch.stack([stats if r == rank else other for r, other in enumerate(others)])

            leaves = [t.clone().requires_grad_() for t in (x, shard)]
            loss, losses = op(*leaves, labels, gather, 16 * rank, 40, *terms, return_losses=True)
            dx, dweight = torch.autograd.grad(loss / 3, leaves)
            shares += dx
            found.extend((loss.detach(), losses, dweight))
        found.append(shares)
    slack = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, own, rtol=slack, atol=slack, check_dtype=False)


def _linear_inputs(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(23, 16, generator=generator).to(device, dtype)
    weight = (torch.randn(48, 16, generator=generator) * 0.5).to(device, dtype)
    labels = torch.randint(0, 40, (23,), generator=generator).to(device)
    labels[::4] = -100
    return [x, weight, labels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [100, 8])  # of a chunk: all in one; three chunks
def test_linear_cross_entropy(device: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "most_rows", lambda vocab, size: rows)
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda count, vocab, size: min(rows, count))
    x, weight, labels = _linear_inputs(device, dtype)
    settings = (-100, 0.1, 1e-3, 40)

    def own(x: Tensor, w: Tensor) -> Tensor:
        return plain.reference(x @ w.T, labels, *settings).sum()

    twice(lambda x, w: ops.linear_cross_entropy(x, w, labels, *settings), own, [x, weight])
    with torch.no_grad():
        loss = ops.linear_cross_entropy(x, weight, labels, *settings)
    close(loss, own(x, weight), plain_linear.reference(x.double(), weight.double(), labels, *settings))
    for needed in ((True, False), (False, True)):
        leaves = [t.detach().clone().requires_grad_(n) for t, n in zip((x, weight), needed, strict=True)]
        (ops.linear_cross_entropy(*leaves, labels, *settings) / 7).backward()
        assert [leaf.grad is not None for leaf in leaves] == list(needed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [100, 8])
def test_its_weight_gradient_lands_in_the_sink(
    device: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two micro-batches, without rounding the sum: as if each had been added in fp64."""
    monkeypatch.setattr(ops, "most_rows", lambda vocab, size: rows)
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda count, vocab, size: min(rows, count))
    x, weight, labels = _linear_inputs(device, dtype)
    weight = torch.nn.Parameter(weight)
    sink = weight.gradient_sink = Sink(weight, torch.float32)  # type: ignore[attr-defined]
    upstream = torch.tensor(1 / 19, device=device)
    settings = (-100, 0.1, 1e-3, 40)
    exact = torch.zeros(weight.shape, dtype=torch.float64, device=device)
    for factor in (1.0, -0.5):
        here, alone = (x * factor).requires_grad_(), (x * factor).requires_grad_()
        ops.linear_cross_entropy(here, weight, labels, *settings, upstream=upstream).backward(upstream)
        ops.linear_cross_entropy(alone, weight.detach(), labels, *settings).backward(upstream)
        assert here.grad is not None and alone.grad is not None
        # Chunks round dlogits and dx after the upstream gradient has come in, or before.
        ulps = 4 * torch.finfo(dtype).eps * alone.grad.abs().max().item()
        torch.testing.assert_close(here.grad, alone.grad, rtol=0, atol=ulps)
        wide = weight.detach().double().requires_grad_()
        plain_linear.reference((x * factor).double(), wide, labels, *settings).backward(upstream.double())
        assert wide.grad is not None
        exact += wide.grad
    assert weight.grad is None and sink.calls == sink.done == 2
    # Each of 23 dlogits, at most 1 / 19, is rounded to dtype.
    slack = 23 * torch.finfo(dtype).eps * (1 / 19) * x.abs().max().item()
    torch.testing.assert_close(sink.total.double(), exact, rtol=0, atol=slack)
    assert not sink.total[40:].any(), "padding has a gradient"


def test_a_promise_is_not_needed_where_logits_are_kept(device: str) -> None:
    x, weight, labels = _linear_inputs(device, torch.float32)
    weight = torch.nn.Parameter(weight)
    sink = weight.gradient_sink = Sink(weight, torch.float32)  # type: ignore[attr-defined]
    loss = ops.linear_cross_entropy(x, weight, labels, vocab=40)
    assert sink.calls == 0
    loss.backward()
    other = weight.detach().clone().requires_grad_()
    ops.linear_cross_entropy(x, other, labels, vocab=40).backward()
    assert sink.done == 1
    torch.testing.assert_close(sink.total, other.grad)


def test_a_second_backward_over_used_up_logits_is_refused(device: str) -> None:
    x, weight, labels = _linear_inputs(device, torch.float32)
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, labels, vocab=40)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunks_are_nearly_equal_and_hold_about_a_gibibyte() -> None:
    assert linear_cross_entropy.chunk_rows(4096, 128256, 2) == 4096
    assert linear_cross_entropy.chunk_rows(16384, 50304, 2) == 8192
    assert linear_cross_entropy.chunk_rows(0, 50304, 2) == 0
    for rows in (1, 5000, 10673, 10674, 100_000):
        chunk = linear_cross_entropy.chunk_rows(rows, 50304, 2)
        assert chunk <= rows
        assert chunk * 50304 * 2 <= 2**30 + 128 * 50304 * 2
