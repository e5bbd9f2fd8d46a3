"""What a resumed run may change: its config held against that of the run folder, by arithmetic alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapre.errors import UserError

from .folder import open_run

if TYPE_CHECKING:
    from megapre.config import Config

# Beside the model. What else changes is reported.
FIXED = ("run.dtype", "optim.master", "optim.moments", "batch.global", "batch.seq_length")


class ResumeError(UserError):
    """A run cannot go on with this config."""


def changes(run: Path, cfg: Config) -> list[str]:
    """In words, the knobs of `cfg`, whose vocabulary is known, that differ from the run's; none where there is no run.

    Raises ResumeError where its checkpoints do not fit the model or the precision, or its data the batch.
    """
    if not (run / "config.toml").exists():
        return []
    before, now = _knobs(open_run(run)), _knobs(cfg)
    found = {
        key: f"{key} {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    fixed = [text for key, text in found.items() if key.startswith("model.") or key in FIXED]
    if fixed:
        raise ResumeError(
            f"the run {run} cannot go on with {'; '.join(fixed)}: model, precision and batch size stay; resume it with "
            f"{run / 'config.toml'}, or begin a new run under another name"
        )
    return list(found.values())


def _knobs(cfg: Config) -> dict[str, Any]:
    """Every knob of a config by dotted name."""
    knobs: dict[str, Any] = {}
    for section, value in cfg.model_dump(mode="json", by_alias=True).items():
        knobs |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    return knobs
