"""Loss scaling for fp16 (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2), decided on the device.

fp16 holds nothing below 6e-8, and gradients of activations are mostly smaller. So the backward starts from the loss
times a scale, and the optimizer divides by it again, in fp32, as it reads the gradients. A scale that is too large
shows as gradients that are not finite: the update is skipped and the scale halved. One that is too small shows in
nothing, so it is doubled after so many good steps in a row. Growth, backoff and first scale are those of
torch.amp.GradScaler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megapre.config import Optim

INITIAL = 2.0**16
SMALLEST, LARGEST = 1.0, 2.0**24  # powers of two, so that neither scaling nor dividing rounds


class LossScale:
    """The scale of a run's loss and how many good steps it has served: 0-dim fp32 tensors on the device."""

    def __init__(self, optim: Optim, device: torch.device) -> None:
        self.dynamic = optim.loss_scale == 0
        self.window = optim.loss_scale_window
        self.scale = torch.full((), optim.loss_scale or INITIAL, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """After a step: halves where `skipped` is 1, doubles at the end of a window. A fixed scale stays."""
        if not self.dynamic:
            return
        good = (self.good_steps + 1.0) * (1.0 - skipped)
        grows = (good >= self.window).to(torch.float32)
        self.scale.mul_((1.0 - 0.5 * skipped) * (1.0 + grows)).clamp_(SMALLEST, LARGEST)
        self.good_steps.copy_(good * (1.0 - grows))

    def tensors(self) -> dict[str, Tensor]:
        """Its part of a checkpoint. A fixed scale is saved but not loaded: it is what the config says."""
        own = {"optim.loss_scale": self.scale, "optim.good_steps": self.good_steps}
        return own if self.dynamic else {name: tensor.clone() for name, tensor in own.items()}
