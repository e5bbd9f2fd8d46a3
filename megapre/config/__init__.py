"""The schema of a run: every knob, its default, its unit and the arithmetic it must obey. Nothing else defines a knob.

    cfg = load("gpt2-124m", ["layout.tp=2", "optim.lr=3e-4"])
    cfg.model.hidden, cfg.batch.micro_batches(dp=8)

A `Config` is frozen and always consistent: the rules of `rules.py` hold for every one that exists.
"""

from .describe import Knob, describe, help_text, reference
from .errors import ConfigError
from .load import load, recipe_names
from .schema import (
    GPT2_VOCAB,
    Batch,
    Checkpoint,
    Comm,
    Config,
    Data,
    Layout,
    Model,
    Optim,
    RopeScaling,
    Run,
    Source,
    Stage,
)
from .toml import to_toml

__all__ = [
    "GPT2_VOCAB",
    "Batch",
    "Checkpoint",
    "Comm",
    "Config",
    "ConfigError",
    "Data",
    "Knob",
    "Layout",
    "Model",
    "Optim",
    "RopeScaling",
    "Run",
    "Source",
    "Stage",
    "describe",
    "help_text",
    "load",
    "recipe_names",
    "reference",
    "to_toml",
]
