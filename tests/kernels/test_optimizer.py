"""Flat AdamW against torch.optim.AdamW, and the gradient norm against torch's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close
from torch import Tensor

from megapre import kernels

HYPER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def random(length: int, seed: int, device: str) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(device)


def with_torch(start: Tensor, grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    weight = torch.nn.Parameter(start.to(dtype).clone())
    optimizer = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for grad in grads:
        weight.grad = grad.to(dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.op("adamw_")
@given(
    length=st.integers(0, 300),
    steps=st.integers(1, 4),
    narrow=st.booleans(),
    bf16_grad=st.booleans(),
    scale=st.none() | st.sampled_from([0.25, 0.3]),
)
def test_adamw_obeys_the_rule(
    device: str, implementation: str, length: int, steps: int, narrow: bool, bf16_grad: bool, scale: float | None
) -> None:
    op = kernels.choose(device, {"adamw_": implementation}).adamw_
    start = random(length, 0, device)
    grads = [random(length, 1 + at, device).to(torch.bfloat16 if bf16_grad else torch.float32) for at in range(steps)]
    master = start.clone()
    param = master.bfloat16() if narrow else master
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    for step, grad in enumerate(grads, 1):
        op(
            param,
            master,
            exp_avg,
            exp_avg_sq,
            grad.clone(),
            lr=torch.tensor(1e-2, device=device),
            step=torch.tensor(float(step), device=device),
            grad_scale=None if scale is None else torch.tensor(scale, device=device),
            **HYPER,
        )
    scaled = [grad.double() * torch.tensor(1.0 if scale is None else scale).double().item() for grad in grads]
    close(master, with_torch(start, scaled, torch.float32), with_torch(start, scaled, torch.float64), "master")
    assert torch.equal(param, master.to(param.dtype))


@pytest.mark.op("adamw_")
@pytest.mark.parametrize("narrow", [False, True])
def test_found_inf_leaves_everything(device: str, implementation: str, narrow: bool) -> None:
    op = kernels.choose(device, {"adamw_": implementation}).adamw_
    master, exp_avg, exp_avg_sq = random(50, 0, device), random(50, 1, device), random(50, 2, device).abs()
    param = master.bfloat16() if narrow else master
    grad = random(50, 3, device)
    grad[7], grad[8] = float("inf"), float("nan")
    before = [t.clone() for t in (param, master, exp_avg, exp_avg_sq)]
    for found, changes in ((1.0, False), (0.0, True)):
        op(
            param,
            master,
            exp_avg,
            exp_avg_sq,
            grad.clone(),
            lr=torch.tensor(1e-2, device=device),
            step=torch.tensor(3.0, device=device),
            grad_scale=torch.tensor(0.5, device=device),
            found_inf=torch.tensor(found, device=device),
            **HYPER,
        )
        after = (param, master, exp_avg, exp_avg_sq)
        assert all(torch.equal(a, b) != changes for a, b in zip(before, after, strict=True))


@pytest.mark.op("adamw_")
def test_a_tensor_of_lr_drives_the_update(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"adamw_": implementation}).adamw_
    results = []
    for lr in (0.0, 1e-2):
        master = random(20, 0, device)
        moments = torch.zeros(2, 20, device=device)
        op(
            master,
            master,
            moments[0],
            moments[1],
            random(20, 1, device),
            lr=torch.tensor(lr, device=device),
            step=torch.tensor(1.0, device=device),
            **HYPER,
        )
        results.append(master)
    assert torch.equal(results[0], random(20, 0, device))
    # On the first step every update is lr in size, up to eps and the decay.
    torch.testing.assert_close(
        (results[1] - results[0] * (1 - 1e-3)).abs(), torch.full((20,), 1e-2, device=device), rtol=1e-3, atol=0
    )


@pytest.mark.op("adamw_")
def test_states_that_do_not_fit_are_named(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"adamw_": implementation}).adamw_
    flat, other = torch.zeros(4, device=device), torch.zeros(5, device=device)
    scalars = {"lr": torch.tensor(0.1, device=device), "step": torch.tensor(1.0, device=device)}
    with pytest.raises(ValueError, match=r"\(4,\), \(4,\), \(4,\), \(4,\), \(5,\)"):
        op(flat, flat, flat, flat, other, **scalars, **HYPER)
    with pytest.raises(ValueError, match="must share a dtype"):
        op(flat, flat, flat.double(), flat, flat, **scalars, **HYPER)


@pytest.mark.op("adamw_stochastic_")
@given(length=st.integers(0, 300), narrow=st.booleans(), bf16_grad=st.booleans(), scale=st.none() | st.just(0.3))
def test_stochastic_adamw_stays_within_a_spacing(
    device: str, implementation: str, length: int, narrow: bool, bf16_grad: bool, scale: float | None
) -> None:
    op = kernels.choose(device, {"adamw_stochastic_": implementation}).adamw_stochastic_
    grad = random(length, 1, device).to(torch.bfloat16 if bf16_grad else torch.float32)
    start = random(length, 0, device).bfloat16()
    param, moments = start.clone(), torch.zeros(2, length, device=device, dtype=torch.bfloat16 if narrow else None)
    scalars = {"lr": torch.tensor(1e-2, device=device), "step": torch.tensor(1.0, device=device)}
    factor = None if scale is None else torch.tensor(scale, device=device)
    op(param, moments[0], moments[1], grad, **scalars, seed=4, grad_scale=factor, **HYPER)
    exact = with_torch(start, [grad.double() * torch.tensor(1.0 if scale is None else scale)], torch.float64)
    # Between the neighbours of the true value: 2^-7 of it at most, and what fp32 loses where terms cancel.
    assert bool(((param.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-7).all())
    assert bool(((moments[0].double() - 0.1 * grad.double() * (scale or 1)).abs() <= 2**-7 * grad.abs() + 1e-7).all())


@pytest.mark.op("adamw_stochastic_")
def test_updates_below_the_spacing_add_up_on_average(device: str, implementation: str) -> None:
    """50 updates of 1e-5 to weights of 1.0, whose lower neighbour is 2^-8 away: nearest rounding would undo each.

    A weight moves down by 2^-8 with probability 1e-5 * 2^8 = 0.00256 a step; over n weights and k steps the mean
    scatters by 2^-8 sqrt(0.00256 k / n), and five of these are allowed.
    """
    op = kernels.choose(device, {"adamw_stochastic_": implementation}).adamw_stochastic_
    n, steps = 20_000, 50
    param = torch.ones(n, device=device, dtype=torch.bfloat16)
    moments, grad = torch.zeros(2, n, device=device), torch.ones(n, device=device)
    for step in range(1, steps + 1):
        scalars = {"lr": torch.tensor(1e-5, device=device), "step": torch.tensor(float(step), device=device)}
        op(param, *moments, grad, **scalars, seed=0, **{**HYPER, "weight_decay": 0.0})
    moved = 1 - param.double().mean().item()
    assert abs(moved - steps * 1e-5) < 5 * 2**-8 * (0.00256 * steps / n) ** 0.5


@pytest.mark.op("grad_norm")
@given(
    lengths=st.lists(st.integers(0, 40) | st.sampled_from([4095, 4096, 4097, 200_000]), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_grad_norm_obeys_the_rule(device: str, implementation: str, lengths: list[int], dtype: torch.dtype) -> None:
    op = kernels.choose(device, {"grad_norm": implementation}).grad_norm
    grads = [random(length, length, device).to(dtype) for length in lengths]
    total = op(grads)
    assert total.shape == () and total.dtype == torch.float32
    wide = [grad.double() for grad in grads]
    close(
        total,
        torch.nn.utils.get_total_norm([g.float() for g in grads]),
        torch.nn.utils.get_total_norm(wide).double(),
        "norm",
    )


@pytest.mark.op("grad_norm")
def test_grad_norm_is_the_same_for_every_number_of_threads(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"grad_norm": implementation}).grad_norm
    grads = [random(1_000_003, 0, device), random(77, 1, device).bfloat16(), random(600, 2, device).view(20, 30).T]
    threads = torch.get_num_threads()
    norms = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        norms.append(op(grads))
    torch.set_num_threads(threads)
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[0], norms[2])


@pytest.mark.op("grad_norm")
def test_grad_norm_of_what_is_not_finite(device: str, implementation: str) -> None:
    op = kernels.choose(device, {"grad_norm": implementation}).grad_norm
    good = torch.ones(3, device=device)
    assert op([good, torch.tensor([1.0, float("inf")], device=device)]).isinf()
    assert op([good, torch.tensor([1.0, float("nan")], device=device)]).isnan()
    assert op([]) == 0
