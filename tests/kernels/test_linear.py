"""The linear layer against torch's own, by the 2x rule; gradients into sinks; autocast."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import twice
from sink import Sink
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels

OP = "linear"
SIZES = st.integers(1, 40) | st.sampled_from([64, 65, 128])


def drawn(seed: int, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=SIZES, ins=SIZES, outs=SIZES, bias=st.booleans())
def test_obeys_the_rule(
    device: str, implementation: str, dtype: torch.dtype, rows: int, ins: int, outs: int, bias: bool
) -> None:
    op = kernels.choose(device, {OP: implementation}).linear
    shapes = [(2, rows, ins), (outs, ins), *([(outs,)] if bias else [])]
    twice(op, F.linear, [drawn(i, *s, dtype=dtype, device=device) for i, s in enumerate(shapes)])


def test_errors(device: str, implementation: str) -> None:
    op = kernels.choose(device, {OP: implementation}).linear
    x, weight = torch.ones(3, 8, device=device), torch.ones(5, 7, device=device)
    with pytest.raises(ValueError, match=r"they are \(3, 8\) and \(5, 7\)"):
        op(x, weight)
    with pytest.raises(ValueError, match=r"bias is \(4,\); weight \(5, 7\) needs \[5\]"):
        op(x[:, :7], weight, torch.ones(4, device=device))


def test_autocast(device: str, implementation: str) -> None:
    """As F.linear does: fp32 parameters multiply in autocast's dtype and get fp32 gradients."""
    if implementation == "reference":
        pytest.skip("the reference computes in fp32 whatever autocast says")
    op = kernels.choose(device, {OP: implementation}).linear
    x, weight = (drawn(i, 4, 6, dtype=torch.float32, device=device).requires_grad_() for i in range(2))
    with torch.autocast(device, torch.bfloat16):
        y = op(x, weight)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and weight.grad is not None and x.grad.dtype == weight.grad.dtype == torch.float32


def parameter(
    seed: int, *shape: int, dtype: torch.dtype, sink_dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.nn.Parameter:
    made = torch.nn.Parameter(drawn(seed, *shape, dtype=dtype, device=device))
    made.gradient_sink = Sink(made, sink_dtype)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("dtype", "sums_in"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("postponed", [False, True])
def test_gradients_land_in_sinks(
    device: str, implementation: str, dtype: torch.dtype, sums_in: torch.dtype, postponed: bool
) -> None:
    if implementation == "reference":
        pytest.skip("the reference knows nothing of sinks")
    op = kernels.choose(device, {OP: implementation}).linear
    weight, bias = (parameter(1, *shape, dtype=dtype, sink_dtype=sums_in, device=device) for shape in ((5, 6), (5,)))
    later: list[Callable[[], None]] = []
    weight.gradient_sink.postponed = later if postponed else None
    expected, sums = torch.zeros(5, 6, device=device), torch.zeros(5, device=device)
    for step in range(3):
        x = drawn(10 + step, 2, 4, 6, dtype=dtype, device=device).requires_grad_()
        dy = drawn(20 + step, 2, 4, 5, dtype=dtype, device=device)
        op(x, weight, bias).backward(dy)
        rows = dy.reshape(-1, 5).float()
        expected += rows.T @ x.detach().reshape(-1, 6).float()
        sums += rows.sum(0)
        torch.testing.assert_close(x.grad, (dy @ weight).detach())
    assert len(later) == (3 if postponed else 0)
    for write in later:
        write()
    assert weight.grad is None and bias.grad is None
    for sink, exact in ((weight.gradient_sink, expected), (bias.gradient_sink, sums)):
        ulps = 3 * torch.finfo(sums_in).eps * exact.abs().max().item()  # a rounding for each of three additions
        torch.testing.assert_close(sink.total.float(), exact, atol=ulps, rtol=0)


def test_a_sink_is_not_asked_where_no_gradient_is_wanted(device: str, implementation: str) -> None:
    op = kernels.choose(device, {OP: implementation}).linear
    weight = parameter(1, 5, 6, dtype=torch.float32, device=device)
    x = torch.ones(2, 6, requires_grad=True, device=device)
    with torch.no_grad():
        op(x, weight)
    weight.requires_grad_(False)
    op(x, weight).sum().backward()
    assert weight.gradient_sink.calls == 0 and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_writes_its_weight_gradient_into_the_sink(dtype: torch.dtype) -> None:
    op = kernels.choose("cpu").linear_cross_entropy
    weight, plain = parameter(1, 11, 6, dtype=dtype), parameter(1, 11, 6, dtype=dtype)
    del plain.gradient_sink
    labels = torch.tensor([3, -100, 8, 0, 5])
    upstream = torch.tensor(0.125)
    expected = torch.zeros(11, 6)
    for step in range(2):
        x = drawn(10 + step, 5, 6, dtype=dtype, device="cpu")
        here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss = op(here, weight, labels, vocab=9, upstream=upstream)
        own = op(there, plain, labels, vocab=9)
        assert loss.item() == own.item()
        loss.backward(upstream)
        own.backward(upstream)
        torch.testing.assert_close(here.grad, there.grad)
        assert plain.grad is not None
        expected += plain.grad.float()
        plain.grad = None
    assert weight.grad is None
    sink = weight.gradient_sink.total
    ulps = 2 * torch.finfo(dtype).eps * sink.abs().max().item()  # each step's own gradient is rounded to dtype
    torch.testing.assert_close(sink, expected, atol=ulps, rtol=0)
    assert not sink[9:].any(), "padding has a gradient"


def test_a_broken_promise_of_the_upstream_gradient_is_an_error() -> None:
    op = kernels.choose("cpu").linear_cross_entropy
    weight = parameter(1, 11, 6, dtype=torch.float32)
    loss = op(torch.ones(2, 6, requires_grad=True), weight, torch.tensor([1, 2]), upstream=torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"made for upstream = 0\.5, and the backward brings 1\.0"):
        loss.backward()
