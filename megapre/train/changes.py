"""What a resumed run may change: its config held against that of the run folder, by arithmetic alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapre.errors import UserError
from megapre.schedule import BUILDERS

from . import schedule_copy
from .folder import newest_checkpoint, open_run

if TYPE_CHECKING:
    from megapre.config import Config

# Beside the model and the order of samples. What else changes is reported.
FIXED = ("run.dtype", "optim.master", "optim.moments", "batch.global", "batch.seq_length")


class ResumeError(UserError):
    """A run cannot go on with this config."""


def changes(run: Path, cfg: Config, reorder: bool = False) -> list[str]:
    """In words, the knobs of `cfg`, whose vocabulary is known, that differ from the run's; none where there is no run.

    Raises ResumeError where its checkpoints do not fit the model or the precision, or its data the batch; and, unless
    `reorder`, where samples would come in another order than that in which some were consumed.
    """
    if not (run / "config.toml").exists():
        return []
    begun = open_run(run)
    before, now = _knobs(begun), _knobs(cfg)
    found = {
        key: f"{key} {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    if "layout.schedule" in found or begun.layout.schedule not in BUILDERS:
        found.pop("layout.schedule", None)
        if text := schedule_copy.difference(begun.layout.schedule, cfg.layout.schedule):
            found["layout.schedule"] = f"layout.schedule {text}"
    fixed = [text for key, text in found.items() if key.startswith("model.") or key in FIXED]
    if fixed:
        raise ResumeError(
            f"the run {run} cannot go on with {'; '.join(fixed)}: model, precision and batch size stay; resume it with "
            f"{run / 'config.toml'}, or begin a new run under another name"
        )
    if not reorder and (saved := newest_checkpoint(run)) is not None:
        _same_order(run, begun, cfg, int(saved.name.removeprefix("step_")))
    return list(found.values())


def _same_order(run: Path, before: Config, now: Config, step: int) -> None:
    """Raises ResumeError where `now` orders samples otherwise than `before`, of which `step` steps are saved."""
    then, other = _order(before), _order(now)
    changed = [
        f"{name} {then[name][1]} -> {other[name][1]}"
        for name in then
        if name in other and then[name][0] != other[name][0]
    ]
    if not changed:
        return
    consumed, planned = step * now.batch.global_, now.run.steps * now.batch.global_
    raise ResumeError(
        f"the run {run} has consumed {consumed:,} samples in {step:,} steps and would take the other "
        f"{max(planned - consumed, 0):,} of {planned:,} from another order, some of them again and others never: "
        f"{'; '.join(changed)}. Resume it with {run / 'config.toml'}, or with --reorder-data if that is meant"
    )


def _order(cfg: Config) -> dict[str, tuple[Any, str]]:
    """What the order of a run's training samples follows from, and how a user writes it: all but the files, their
    number and the run's length, which megapre.data.order compares. Of a split the part of training counts, of weights
    their ratio.
    """
    data = cfg.data
    split = [float(weight) for weight in data.split.split(",")]
    whole = bool(data.valid)
    found: dict[str, tuple[Any, str]] = {
        "data.seed": (data.seed, str(data.seed)),
        "data.split": (1.0 if whole else split[0] / sum(split), "unused beside data.valid" if whole else data.split),
    }
    stages = [(stage.until_tokens, stage.train) for stage in data.stages] or [(0, data.train)]
    ends = [until for until, _ in stages[:-1]]  # the last one goes on to the end
    found["data.stages"] = ends, f"{len(stages)} from {[0, *ends]} tokens on" if ends else "none"
    for number, (_, sources) in enumerate(stages):
        weights = [source.weight for source in sources if source.weight is not None]
        ratio = [weight / sum(weights) for weight in weights] if len(weights) > 1 else []
        of = f" of data.stages.{number}" if ends else ""
        found[f"weights of the {len(sources)} sources{of}"] = ratio, ", ".join(f"{w:g}" for w in weights) or "none"
    return found


def _knobs(cfg: Config) -> dict[str, Any]:
    """Every knob of a config by dotted name."""
    knobs: dict[str, Any] = {}
    for section, value in cfg.model_dump(mode="json", by_alias=True).items():
        knobs |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    return knobs
