"""Cross-entropy, its form in place, and linear + cross-entropy, against torch's own, by the 2x rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close, run, same, twice
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels

OP = "cross_entropy"
DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = {
    "label_smoothing": st.sampled_from([0.0, 0.1]),
    "z_loss": st.sampled_from([0.0, 1e-3]),
    "padding": st.integers(0, 5),
    "seed": st.integers(0, 1000),
}


def losses_of_torch(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, vocab: int, ignore_index: int = -100
) -> Tensor:
    logits = logits[:, :vocab]
    losses = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    return losses + (z_loss * torch.logsumexp(logits, -1).square()).where(labels != ignore_index, 0.0)


def sample(rows: int, columns: int, vocab: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * 4).to(device, dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    return logits, labels.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 9), vocab=st.integers(1, 70) | st.sampled_from([128, 1000]), **SETTINGS)
def test_cross_entropy_obeys_the_rule(
    device: str,
    implementation: str,
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    label_smoothing: float,
    z_loss: float,
    padding: int,
    seed: int,
) -> None:
    op = kernels.choose(device, {OP: implementation}).cross_entropy
    logits, labels = sample(rows, vocab + padding, vocab, dtype, device, seed)
    actual = run(lambda x: op(x, labels, -100, label_smoothing, z_loss, vocab), [logits])
    own = run(lambda x: losses_of_torch(x, labels, label_smoothing, z_loss, vocab), [logits])
    exact = run(lambda x: losses_of_torch(x, labels, label_smoothing, z_loss, vocab), [logits.double()])
    assert actual[0][0].dtype == torch.float32
    assert (actual[0][0][labels == -100] == 0).all() and (actual[1][0][:, vocab:] == 0).all()
    close(actual[0][0], own[0][0], exact[0][0], "losses")
    close(actual[1][0], own[1][0], exact[1][0], "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 9), vocab=st.integers(1, 70), weighted=st.booleans(), **SETTINGS)
def test_cross_entropy_in_place_obeys_the_rule(
    device: str,
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    weighted: bool,
    label_smoothing: float,
    z_loss: float,
    padding: int,
    seed: int,
) -> None:
    kernels.choose(device)
    columns = vocab + padding
    logits, labels = sample(rows, columns, vocab, dtype, device, seed)
    exact_losses, exact_grad = run(
        lambda x: losses_of_torch(x, labels, label_smoothing, z_loss, vocab), [logits.double()], seed
    )
    own_losses, own_grad = run(lambda x: losses_of_torch(x, labels, label_smoothing, z_loss, vocab), [logits], seed)
    upstream = torch.randint(-2, 3, (rows,), generator=torch.Generator().manual_seed(seed)).float().to(device)
    if not weighted:
        ones = torch.ones(rows, device=device)
        exact_grad = list(
            torch.autograd.grad(
                losses_of_torch(leaf := logits.double().requires_grad_(), labels, label_smoothing, z_loss, vocab),
                leaf,
                ones.double(),
            )
        )
        own_grad = list(
            torch.autograd.grad(
                losses_of_torch(leaf := logits.clone().requires_grad_(), labels, label_smoothing, z_loss, vocab),
                leaf,
                ones.to(dtype),
            )
        )
    # Rows of a wider buffer: what lies beyond a row's columns must stay, and padded columns hold NaN before.
    buffer = torch.full((rows, columns + 3), 7.0, dtype=dtype, device=device)
    view = buffer[:, :columns]
    view.copy_(logits)
    view[:, vocab:] = float("nan")
    losses = torch.ops.megapre.cross_entropy_(
        view, labels, upstream if weighted else None, -100, label_smoothing, z_loss, vocab
    )
    close(losses, own_losses[0], exact_losses[0], "losses")
    close(view, own_grad[0], exact_grad[0], "gradient")
    assert (view[:, vocab:] == 0).all() and (view[labels == -100] == 0).all()
    assert (buffer[:, columns:] == 7.0).all()


def test_large_logits_and_ignored_rows_of_nan(device: str, implementation: str) -> None:
    op = kernels.choose(device, {OP: implementation}).cross_entropy
    logits = torch.tensor([[1e4, 0.0, -1e4], [88.0, 88.0, 88.0], [-1e4, -1e4, -1e4]], device=device)
    losses = op(logits, torch.tensor([1, 0, 2], device=device))
    torch.testing.assert_close(
        losses.cpu(), torch.tensor([1e4, 3.0, 3.0]).log().where(torch.tensor([False, True, True]), 1e4)
    )
    poisoned = torch.tensor([[float("nan")] * 3, [1.0, 2.0, 3.0]], device=device)
    kernels.choose(device)
    labels = torch.tensor([-100, 0], device=device)
    assert op(poisoned, labels)[0] == 0
    torch.ops.megapre.cross_entropy_(poisoned, labels, None, -100, 0.0, 0.0, 3)
    assert (poisoned[0] == 0).all() and torch.isfinite(poisoned[1]).all()


def test_strided_logits_and_other_ignore_index(device: str, implementation: str) -> None:
    op = kernels.choose(device, {OP: implementation}).cross_entropy
    base, labels = sample(12, 40, 20, torch.float32, device, 3)
    labels[labels == -100] = 5
    for x in (base[:, ::2], base[:, 10:30], base.T[:20].T):
        strided = run(lambda x: op(x, labels, ignore_index=5), [x])
        packed = run(lambda x: op(x, labels, ignore_index=5), [x.contiguous()])
        assert same(strided[0] + strided[1], packed[0] + packed[1])
        assert (strided[0][0][labels == 5] == 0).all()


def test_bad_labels_and_vocab_are_errors(implementation: str, device: str) -> None:
    if device == "cuda":
        pytest.skip("a bad label stops the CUDA context for good")
    op = kernels.choose(device, {OP: implementation}).cross_entropy
    logits = torch.zeros(3, 10)
    for bad in (10, -1, 9):
        if implementation == "triton":  # in the interpreter
            assert op(logits, torch.tensor([0, bad, 1]), vocab=9).isnan().tolist() == [False, True, False]
            continue
        with pytest.raises(ValueError, match=str(bad)):
            op(logits, torch.tensor([0, bad, 1]), vocab=9)
    with pytest.raises(ValueError, match="vocab is 11"):
        op(logits, torch.tensor([0, 1, 2]), vocab=11)
    with pytest.raises(ValueError, match="vocab is 0"):
        op(logits, torch.tensor([0, 1, 2]), vocab=0)
    with pytest.raises(ValueError, match=r"labels \[T\]"):
        op(logits, torch.tensor([0, 1]))


# Linear + cross-entropy


def linear_of_torch(x: Tensor, weight: Tensor, labels: Tensor, *settings: float) -> Tensor:
    logits = F.linear(x, weight)
    return losses_of_torch(logits if x.dtype == torch.float64 else logits.float(), labels, *settings).sum()


def projection(
    rows: int, hidden: int, columns: int, vocab: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator).to(device, dtype)
    weight = torch.randn(columns, hidden, generator=generator).to(device, dtype)
    return x, weight, sample(rows, columns, vocab, dtype, device, seed)[1]


@pytest.mark.op("linear_cross_entropy")
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 17), hidden=st.integers(1, 33), vocab=st.integers(1, 70), **SETTINGS)
def test_linear_cross_entropy_obeys_the_rule(
    device: str,
    implementation: str,
    dtype: torch.dtype,
    rows: int,
    hidden: int,
    vocab: int,
    label_smoothing: float,
    z_loss: float,
    padding: int,
    seed: int,
) -> None:
    op = kernels.choose(device, {"linear_cross_entropy": implementation}).linear_cross_entropy
    x, weight, labels = projection(rows, hidden, vocab + padding, vocab, dtype, device, seed)
    twice(
        lambda x, w: op(x, w, labels, -100, label_smoothing, z_loss, vocab),
        lambda x, w: linear_of_torch(x, w, labels, label_smoothing, z_loss, vocab),
        [x, weight],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy_over_many_chunks(device: str, dtype: torch.dtype) -> None:
    kernels.choose(device)
    x, weight, labels = projection(1100, 24, 61, 59, dtype, device, 1)

    def chunks_of_256(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.megapre.linear_cross_entropy(x, w, labels, -100, 0.1, 1e-3, 59, 1, True, True)[0]

    twice(chunks_of_256, lambda x, w: linear_of_torch(x, w, labels, 0.1, 1e-3, 59), [x, weight])
    first, second = run(chunks_of_256, [x, weight]), run(chunks_of_256, [x, weight])
    assert same(first[0] + first[1], second[0] + second[1])
    assert (first[1][1][59:] == 0).all()


def test_no_more_logits_than_allowed_exist_at_a_time() -> None:
    from megapre.kernels.linear_cross_entropy import chunk_rows

    assert chunk_rows(2048, 50304, 2**25) == 512
    assert chunk_rows(2048, 8192, 2**25) == 2048
    assert chunk_rows(1024, 1_000_000, 2**25) == 256
    assert chunk_rows(1, 50304, 2**25) == 1 and chunk_rows(0, 50304, 2**25) == 0
    for rows in range(1, 3000, 7):
        chunk = chunk_rows(rows, 50304, 2**25)
        assert chunk * 50304 <= 2**25 and -(-rows // chunk) == -(-rows // 667)


@pytest.mark.op("linear_cross_entropy")
def test_linear_cross_entropy_where_only_one_gradient_is_wanted(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"linear_cross_entropy": implementation}).linear_cross_entropy
    x, weight, labels = projection(9, 8, 30, 30, torch.float32, device, 2)
    both = run(lambda x, w: op(x, w, labels), [x, weight])
    (dx,) = torch.autograd.grad(op(leaf := x.clone().requires_grad_(), weight, labels) * 2, leaf)
    (dweight,) = torch.autograd.grad(op(x, leaf := weight.clone().requires_grad_(), labels) * 2, leaf)
    unit = torch.autograd.grad(
        op(a := x.clone().requires_grad_(), b := weight.clone().requires_grad_(), labels), (a, b)
    )
    torch.testing.assert_close(dx, 2 * unit[0])
    torch.testing.assert_close(dweight, 2 * unit[1])
    with torch.no_grad():
        assert torch.equal(op(x, weight, labels), both[0][0])
    assert not op(x, weight, labels).requires_grad


@pytest.mark.op("linear_cross_entropy")
def test_linear_cross_entropy_errors(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"linear_cross_entropy": implementation}).linear_cross_entropy
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(10, 5\)"):
        op(torch.zeros(3, 4, device=device), torch.zeros(10, 5, device=device), torch.zeros(3, dtype=torch.long))
    if device == "cpu" and implementation != "triton":
        with pytest.raises(ValueError, match="label 10 of row 2"):
            op(torch.zeros(3, 4), torch.zeros(10, 4), torch.tensor([0, -100, 10]))
