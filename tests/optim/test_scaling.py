"""The dynamic loss scale: when it halves, when it doubles, where it stops."""

import torch

from megapre.config import Optim
from megapre.optim.scaling import LARGEST, SMALLEST, LossScale

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def scales(scale: LossScale, steps: list[torch.Tensor]) -> list[float]:
    seen = []
    for skipped in steps:
        scale.update(skipped)
        seen.append(scale.scale.item())
    return seen


def test_three_good_steps_double_and_one_bad_halves_and_starts_anew() -> None:
    scale = LossScale(Optim(lr=1e-3, loss_scale_window=3), CPU)
    assert scale.scale.item() == 65536
    seen = scales(scale, [GOOD, GOOD, GOOD, GOOD, GOOD, BAD, GOOD, GOOD, BAD, BAD, GOOD, GOOD, GOOD])
    assert [s / 65536 for s in seen] == [1, 1, 2, 2, 2, 1, 1, 1, 0.5, 0.25, 0.25, 0.25, 0.5]


def test_agrees_with_torchs_grad_scaler() -> None:
    ours = LossScale(Optim(lr=1e-3, loss_scale_window=4), CPU)
    theirs, tracker = torch.tensor(65536.0), torch.tensor(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        skipped = (torch.rand((), generator=generator) < 0.1).float()
        ours.update(skipped)
        torch._amp_update_scale_(theirs, tracker, skipped, 2.0, 0.5, 4)
        theirs.clamp_(SMALLEST, LARGEST)
        assert torch.equal(ours.scale, theirs) and ours.good_steps == tracker


def test_stays_between_its_ends() -> None:
    scale = LossScale(Optim(lr=1e-3, loss_scale_window=1), CPU)
    assert scales(scale, [GOOD] * 12)[-3:] == [LARGEST] * 3
    assert scales(scale, [BAD] * 30)[-5:] == [SMALLEST] * 5


def test_a_fixed_scale_stays_and_is_not_loaded() -> None:
    scale = LossScale(Optim(lr=1e-3, loss_scale=128.0, loss_scale_window=1), CPU)
    assert scales(scale, [GOOD, BAD, GOOD]) == [128.0] * 3
    scale.tensors()["optim.loss_scale"].fill_(7.0)
    assert scale.scale == 128
    dynamic = LossScale(Optim(lr=1e-3), CPU)
    dynamic.tensors()["optim.loss_scale"].fill_(7.0)
    assert dynamic.scale == 7
