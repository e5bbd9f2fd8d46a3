"""Learning-rate schedules as one pure function of the step.

Steps count from 1, as on the step line. Warm-up is linear, lr * step / warmup_steps, the same for every schedule, so
that step `warmup_steps` is the first at the full rate. With w = warmup_steps, n = steps and d = decay_steps (0 = all
the way from the end of warm-up to the last step) the rest is

    constant  lr
    linear    lr -> min_lr on a line from step w to step w + d, then min_lr
    cosine    lr -> min_lr on half a cosine from step w to step w + d, then min_lr      (Loshchilov and Hutter 2016)
    wsd       lr until step n - d, then on a line to min_lr at step n                   (Hu et al. 2024, MiniCPM)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megapre.config import Optim


def lr_at(step: int, optim: Optim, steps: int) -> float:
    """Learning rate of update number `step` (from 1) in a run of `steps` updates."""
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    begin, end = optim.warmup_steps, steps
    if optim.decay_steps and optim.schedule == "wsd":
        begin = max(steps - optim.decay_steps, begin)
    elif optim.decay_steps:
        end = begin + optim.decay_steps
    progress = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * left
