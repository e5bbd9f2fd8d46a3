"""Cross-entropy: in place and not, padded columns, ignored and strided rows, bad labels, cut over ranks, fused."""

import pytest
import torch
from rule import close, run, same, twice
from torch import Tensor

from megapre.kernels import cross_entropy as plain
from megapre.kernels import linear_cross_entropy as plain_linear
from megapre.kernels.triton import cross_entropy, linear_cross_entropy, ops

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
    for columns, vocab in ((64, 64), (65, 65), (1000, 990)):
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
    counts = [100, 50, 0]
    gathered = torch.stack(
        [cross_entropy.statistics(p, labels, 100 * r, counts[r], smoothing) for r, p in enumerate(parts)]
    )
    losses, lse = cross_entropy.merge(gathered, labels, ignore, smoothing, z_loss, vocab)
    upstream = torch.randint(-2, 3, (7,), generator=torch.Generator().manual_seed(0)).float().to(device)
    grads = [
        cross_entropy.gradient(upstream, p, labels, lse, ignore, smoothing, z_loss, counts[r],
                               in_place=True, first=100 * r, whole_vocab=vocab)
        for r, p in enumerate(parts)
    ]  # fmt: skip
    settings = (ignore, smoothing, z_loss, vocab)
    outputs, whole = run(lambda x: ops.cross_entropy(x, labels, *settings), [logits])
    torch.testing.assert_close(losses, outputs[0])
    torch.testing.assert_close(torch.cat(grads, 1), whole[0])


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
