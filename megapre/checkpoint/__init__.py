"""Checkpoints: committed whole or not at all, verified before use, kept by number.

checkpoints/step_00000100/
    manifest.json      step, position in the data, and size and SHA-256 of every other file
    .metadata          torch.distributed.checkpoint's index
    __0_0.distcp       tensors: model.*, master.*, exp_avg.*, exp_avg_sq.*, optim.updates
"""

from .commit import CheckpointError as CheckpointError
from .commit import Manifest as Manifest
from .commit import load as load
from .commit import newest_verified as newest_verified
from .commit import save as save
from .commit import verify as verify
from .retention import retain as retain
