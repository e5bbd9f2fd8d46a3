"""The flat optimizer against torch.optim.AdamW, clipping against torch's, and the skipping of bad updates."""

import math

import pytest
import torch
from torch import Tensor, nn

from megapre import kernels
from megapre.config import Optim
from megapre.model import decays
from megapre.optim.adamw import AdamW
from megapre.optim.clipping import clip_factor, not_finite
from megapre.parallel.data import FlatParameters

OPTIM = Optim(lr=1e-2, weight_decay=0.3, beta2=0.98, eps=1e-6, clip=0.5)
ZERO = torch.zeros(())
IMPLEMENTATIONS = [row.implementation for row in kernels.table("cpu") if row.op == "adamw_" and row.available]


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 5)).to(dtype)


def flat_adamw(net: nn.Module, implementation: str, optim: Optim = OPTIM) -> tuple[FlatParameters, AdamW]:
    ops = kernels.choose("cpu", {"adamw_": implementation})
    flat = FlatParameters(net.named_parameters(), decays)
    return flat, AdamW(flat.groups, optim, ops.adamw_)


def backward(net: nn.Module, seed: int) -> Tensor:
    x = torch.randn(16, 7, generator=torch.Generator().manual_seed(seed)).to(next(net.parameters()).dtype)
    loss = 10 * net(x).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_torch_adamw_with_decay_groups_and_clipping(implementation: str) -> None:
    ours, theirs = small_net(), small_net()
    flat, optimizer = flat_adamw(ours, implementation)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if decays(n, p)], "weight_decay": OPTIM.weight_decay},
        {"params": [p for n, p in theirs.named_parameters() if not decays(n, p)], "weight_decay": 0.0},
    ]
    judge = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    ops = kernels.choose("cpu")
    for seed in range(20):
        flat.begin_step()
        backward(ours, seed)
        flat.finish_step()
        norm = ops.grad_norm([group.grad for group in flat.groups])
        optimizer.step(OPTIM.lr, clip_factor(norm, OPTIM.clip), ZERO)

        judge.zero_grad()
        backward(theirs, seed)
        their_norm = nn.utils.clip_grad_norm_(theirs.parameters(), OPTIM.clip)
        judge.step()
        torch.testing.assert_close(norm, their_norm, rtol=1e-6, atol=0)
    # fp32 sums in another order: a few ulp a step, and AdamW's division by sqrt(v) does not amplify them.
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_clip_factor() -> None:
    assert clip_factor(torch.tensor(2.0), 0.0) is None
    assert clip_factor(torch.tensor(0.3), 1.0).item() == 1.0
    assert clip_factor(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_sees_every_kind_in_every_place(bad: float) -> None:
    good = torch.tensor(1.0)
    assert not_finite(good, good).item() == 0.0
    assert not_finite(good, torch.tensor(bad)).item() == 1.0
    assert not_finite(torch.tensor(bad), good).item() == 1.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_update_changes_nothing_and_does_not_count(implementation: str, bad: float) -> None:
    """Skipping step 2 of 3 leaves exactly what two steps alone leave, bias correction included."""
    nets = [small_net(), small_net()]
    for net, seeds in zip(nets, ([1, None, 2], [1, 2]), strict=True):
        flat, optimizer = flat_adamw(net, implementation)
        for seed in seeds:
            flat.begin_step()
            backward(net, seed or 9)
            flat.finish_step()
            if seed is None:
                flat.groups[0].grad[3] = bad
            norm = kernels.choose("cpu").grad_norm([group.grad for group in flat.groups])
            optimizer.step(OPTIM.lr, clip_factor(norm, OPTIM.clip), not_finite(norm))
        assert optimizer.updates.item() == 2
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_parameters_follow_fp32_master_weights(implementation: str) -> None:
    """Fed the same gradients, master weights take an fp32 run's path bit for bit, and bf16 ones are their rounding."""
    wide, narrow = small_net(), small_net(torch.bfloat16)
    with torch.no_grad():  # the same start: numbers that bf16 holds
        for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
            p.copy_(q)
    optim = OPTIM.model_copy(update={"lr": 1e-4})  # steps far below bf16's spacing
    runs = [flat_adamw(wide, implementation, optim), flat_adamw(narrow, implementation, optim)]
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(group.grad.shape, generator=generator) for group in runs[0][0].groups]
        for flat, optimizer in runs:
            for group, grad in zip(flat.groups, grads, strict=True):
                group.grad.copy_(grad)
            optimizer.step(optim.lr, torch.tensor(0.5), ZERO)
    for a, b in zip(runs[0][0].groups, runs[1][0].groups, strict=True):
        assert a.master is a.param and b.master is not b.param
        assert torch.equal(a.param, b.master)
        assert torch.equal(b.param, b.master.to(torch.bfloat16))


def test_updates_too_small_for_bf16_add_up() -> None:
    """100 steps of 1e-5 move a bf16 weight of 1.0, whose neighbour is 0.0039 away, by about 1e-3 in its master."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(net.weight)
    flat, optimizer = flat_adamw(net, "torch", OPTIM.model_copy(update={"weight_decay": 0.0}))
    flat.groups[0].grad.fill_(1.0)
    for _ in range(100):
        optimizer.step(1e-5, None, ZERO)
    assert flat.groups[0].master[0].item() == pytest.approx(1 - 1e-3, rel=1e-5)


def test_padding_between_parameters_stays_zero() -> None:
    net = small_net()
    flat, optimizer = flat_adamw(net, "torch")
    flat.begin_step()
    backward(net, 0)
    flat.finish_step()
    optimizer.step(OPTIM.lr, None, ZERO)
    for group in flat.groups:
        outside = torch.ones_like(group.param, dtype=torch.bool)
        for slot in group.slots.values():
            outside[slot.start : slot.stop] = False
        assert outside.any(), "nothing was padded, so nothing was tested"
        assert not group.param[outside].any()
