"""rope, gelu, swiglu, geglu, AdamW and the gradients' norm."""

import math

import pytest
import torch
from rule import close, run, same, twice
from torch import Tensor
from torch.nn import functional as F

from megapre.kernels import adamw, gelu, grad_norm, rope, swiglu
from megapre.kernels.triton import activation, ops
from megapre.kernels.triton import rope as triton_rope

DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads, k_heads, head_dim", [(3, 1, 24), (4, 4, 64), (1, 1, 2)])
@pytest.mark.parametrize("given", [False, True])
def test_rope(
    device: str, dtype: torch.dtype, interleaved: bool, heads: int, k_heads: int, head_dim: int, given: bool
) -> None:
    batch, seq_length = 2, 5
    # q and k as they come out of one projection: views that share rows
    qkv = randn(batch, seq_length, heads + 2 * k_heads, head_dim, device=device, dtype=dtype)
    q, k = qkv[:, :, :heads], qkv[:, :, heads : heads + k_heads]
    angles = randn(9, head_dim // 2, device=device, seed=1) * 3
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([[0, 1, 2, 0, 8], [5, 5, 0, 1, 2]], device=device) if given else None

    def own(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope.reference(q, k, cos, sin, positions, interleaved)

    twice(lambda q, k: ops.rope(q, k, cos, sin, positions, interleaved), own, [q, k])
    expected = ops.rope(q, k, cos, sin, positions, interleaved)
    untouched = qkv[:, :, heads + k_heads :].clone()
    got = ops.rope_(qkv, heads, k_heads, cos, sin, positions, interleaved=interleaved)
    assert same([q, k], expected) and same(got, [q, k, qkv[:, :, heads + k_heads :]])
    assert torch.equal(qkv[:, :, heads + k_heads :], untouched)


def test_rope_edges(device: str) -> None:
    cos, sin = torch.ones(4, 2, device=device), torch.zeros(4, 2, device=device)
    q = randn(1, 2, 3, 4, device=device)
    beyond = torch.tensor([[1, 4]], device=device)
    got, _ = ops.rope(q, q, cos, sin, beyond)
    assert torch.equal(got[:, 0], q[:, 0])
    assert bool(got[:, 1].isnan().all())
    assert ops.rope(q[:0], q[:0], cos, sin)[0].shape == (0, 2, 3, 4)
    _, grads = run(lambda q, k: ops.rope(q, k, cos, sin)[1], [q, q.clone()])
    assert bool((grads[0] == 0).all())
    far = torch.empty_strided((1, 2, 3, 4), (2**32, 4, 2**30, 1), device="meta")
    with pytest.raises(ValueError, match=r"within 2\^31 elements; strides \(4294967296, 4, 1073741824, 1\)"):
        triton_rope.rotate(far, far, cos, sin, None, False, in_place=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 100), (2, 3000)])
def test_activations(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    x = randn(rows, 2 * width, device=device, dtype=dtype) * 3
    bias = randn(2 * width, device=device, dtype=dtype, seed=1)

    def own_swiglu(x: Tensor) -> Tensor:
        return F.silu(x[..., :width]) * x[..., width:]

    def own_geglu(x: Tensor) -> Tensor:
        return F.gelu(x[..., :width], approximate="tanh") * x[..., width:]

    twice(ops.swiglu, own_swiglu, [x])
    twice(ops.geglu, own_geglu, [x])
    for form in ("tanh", "none"):
        twice(lambda x, f=form: ops.gelu(x, None, f), lambda x, f=form: F.gelu(x, approximate=f), [x])
        twice(lambda x, b, f=form: ops.gelu(x, b, f), lambda x, b, f=form: F.gelu(x + b, approximate=f), [x, bias])


def test_activations_at_their_ends_strided_and_empty(device: str) -> None:
    ends = torch.tensor([-1e4, -100.0, -10.0, -0.0, 0.0, 10.0, 100.0, 1e4], device=device)
    torch.testing.assert_close(ops.gelu(ends), gelu.reference(ends))
    torch.testing.assert_close(ops.swiglu(ends.repeat(2)), swiglu.reference(ends.repeat(2)))
    base = randn(4, 6, 16, device=device)
    for x in (base.transpose(0, 1), base[:, ::2], base[..., ::2], base[:0]):
        torch.testing.assert_close(ops.swiglu(x), swiglu.reference(x))
        torch.testing.assert_close(run(ops.swiglu, [x])[1][0], run(swiglu.reference, [x])[1][0])


def test_the_bias_gradient_over_many_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "multiprocessors", lambda _: 1)
    x, bias = randn(50, 20, device=device), randn(20, device=device, seed=1)
    twice(lambda x, b: ops.gelu(x, b), lambda x, b: F.gelu(x + b, approximate="tanh"), [x, bias])


def adamw_state(count: int, dtype: torch.dtype, grad_dtype: torch.dtype, device: str) -> list[Tensor]:
    master, m, v, grad = (randn(count, device=device, seed=s) for s in range(4))
    param = master if dtype == torch.float32 else master.to(dtype)
    return [param, master, m * 0.1, v.square() * 0.01, (grad * 0.1).to(grad_dtype)]


@pytest.mark.parametrize("count", [1, 1000, 5000])
@pytest.mark.parametrize("step", [1.0, 2.0, 100.0, 100_000.0])
@pytest.mark.parametrize(
    "dtype, grad_dtype", [(torch.float32,) * 2, (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_adamw(device: str, count: int, step: float, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    scalars = {
        "lr": torch.tensor(0.01, device=device),
        "step": torch.tensor(step, device=device),
        "grad_scale": torch.tensor(0.5, device=device),
        "found_inf": torch.tensor(0.0, device=device),
    }
    numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    state, torchs = (adamw_state(count, dtype, grad_dtype, device) for _ in range(2))
    # fp64 with the moments of the fp32 run's kind; the parameter is the master, rounded at the end
    _, *rest = adamw_state(count, torch.float32, grad_dtype, device)
    exact = [t.double() for t in rest]
    adamw.reference(exact[0], *exact, **scalars, **numbers)
    ops.adamw_(*state, **scalars, **numbers)
    adamw.reference(*torchs, **scalars, **numbers)
    for got, own, true in zip(state[1:4], torchs[1:4], exact[:3], strict=True):
        close(got, own, true)
    assert torch.equal(state[0], state[1].to(dtype))
    before = [t.clone() for t in state]
    ops.adamw_(*state, **(scalars | {"found_inf": torch.tensor(1.0, device=device)}), **numbers)
    assert same(state, before)


def test_adamw_without_momentum_and_without_scalars(device: str) -> None:
    numbers = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-8, "weight_decay": 0.0}
    scalars = {"lr": torch.tensor(0.01, device=device), "step": torch.tensor(3.0, device=device)}
    state, torchs = (adamw_state(100, torch.float32, torch.float32, device) for _ in range(2))
    ops.adamw_(*state, **scalars, **numbers)
    adamw.reference(*torchs, **scalars, **numbers)
    for got, own in zip(state, torchs, strict=True):
        torch.testing.assert_close(got, own)


def test_grad_norm(device: str) -> None:
    grads = [randn(200_000, device=device), randn(3, 5, device=device, seed=1).to(torch.bfloat16)]
    grads += [randn(0, device=device), randn(8, 6, device=device, seed=2).T]
    norm = ops.grad_norm(grads)
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert norm.shape == () and norm.dtype == torch.float32
    close(norm, grad_norm.reference(grads), torch.tensor(exact, dtype=torch.float64, device=device))
    assert torch.equal(norm, ops.grad_norm(grads))
    assert float(ops.grad_norm([])) == 0.0
    grads[0][77777] = float("inf")
    assert float(ops.grad_norm(grads)) == float("inf")
    grads[0][5] = float("nan")
    assert math.isnan(float(ops.grad_norm(grads)))
