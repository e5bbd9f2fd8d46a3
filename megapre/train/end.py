"""What a run leaves when it is done: predicted against measured, and the loss curve."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from .folder import read_metrics
from .memory import comparison, total
from .metrics import bytes_text, duration_text, percent_text
from .plot import loss_curve

if TYPE_CHECKING:
    from megapre.plan import Plan

    from .folder import RunFolder
    from .screen import Screen


def conclude(folder: RunFolder, screen: Screen, plan: Plan, memory: dict[str, int]) -> None:
    """Prints and writes the summary, and draws loss.png where matplotlib is installed.

    `memory`: bytes by category (memory.py) of the rank that took the most, beside what the process held before the
    model was built, which the plan does not count.
    """
    records = read_metrics(folder.path)
    steps = [r for r in records if "loss" in r]
    if not steps:
        screen.say(f"done; {folder.metrics} holds no step to sum up")
        return
    valid = [r["valid_loss"] for r in records if "valid_loss" in r]
    speed = median(r["tokens_per_s"] for r in steps[len(steps) // 10 :])
    seconds = sum(r["step_time_s"] for r in steps)
    summary = {
        "steps": steps[-1]["step"],
        "consumed_tokens": steps[-1]["consumed_tokens"],
        "loss": steps[-1]["loss"],
        "valid_loss": valid[-1] if valid else None,
        "skipped_steps": steps[-1]["skipped_steps"],
        "training_s": seconds,
        "tokens_per_s": speed,
        "mfu": plan.mfu(speed),
        "memory_bytes": {"predicted": plan.memory.as_json(), "measured": {**memory, "total": total(memory)}},
    }
    folder.write_json("summary.json", summary)
    screen.say(
        f"done: {summary['steps']} steps, {summary['consumed_tokens']:,} tokens in {duration_text(seconds)} of steps, "
        f"{speed:,.0f} tok/s (median), mfu {percent_text(plan.mfu(speed))}"
    )
    screen.say(
        f"memory beside the process itself{' on the fullest rank' if plan.mesh.world > 1 else ''}: predicted "
        f"{bytes_text(plan.memory.total)}, measured {bytes_text(total(memory))}"
    )
    screen.say(f"of it {comparison(plan.memory, memory)}")
    try:
        screen.say(f"loss curve: {loss_curve(folder.path, plan.cfg.model.vocab, plan.cfg.name)}")
    except ImportError:
        screen.say("no loss.png: matplotlib is not installed; pip install 'megapre[observe]'")
    except Exception as error:  # a font, a cache folder, a full disk: the run itself is done
        screen.say(f"no loss.png: {error}")
