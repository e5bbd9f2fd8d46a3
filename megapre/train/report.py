"""Tells the world how a run goes: step lines on the screen, objects in the journal. Stops a run that has diverged."""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .folder import read_metrics
from .metrics import Journal, Meter, Record, StepLine, Timed

if TYPE_CHECKING:
    import torch

    from megapre.config import Config
    from megapre.plan import Plan

    from .evaluate import Validation
    from .folder import RunFolder
    from .save import Progress
    from .screen import Screen

SKIPS_IN_ROW = 5  # updates skipped one after the other, after which a run has lost its way


class Diverged(RuntimeError):
    """Several steps in a row had a loss or gradient norm that was not finite."""


class Report:
    """Collects timed steps, and every `run.log_every` steps writes them out."""

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        folder: RunFolder,
        screen: Screen,
        plan: Plan,
        progress: Progress,
    ) -> None:
        self.cfg, self.screen, self.progress = cfg, screen, progress
        self.meter = Meter(device, cfg.batch.global_, cfg.batch.seq_length, plan.mfu, progress.skipped_steps)
        earlier = [r["loss"] for r in read_metrics(folder.path) if r.get("loss") is not None]
        self.line = StepLine(cfg.run.steps, device, earlier)
        events = folder.path / "tensorboard" if cfg.run.tensorboard else None
        self.journal = Journal(folder.metrics, events, screen.say, purge_step=progress.step + 1)
        self.skips_in_row = 0

    def __enter__(self) -> Self:
        self.screen.begin(self.progress.step, self.cfg.run.steps)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.screen.finish()
        self.journal.close()

    def add(self, step: Timed) -> None:
        self.meter.add(step)
        self.screen.advance(step.step)

    def flush(self) -> None:
        """Writes out every step that has gathered; the newest gets the step line. Raises Diverged."""
        records = self.meter.collect(self.progress.consumed_samples)
        for record in records:
            line = self.line.see(record)
            if record is records[-1]:
                self.screen.say(line)
        for record in records:
            self.journal.write(record.as_json())
            self._watch(record)
        self.progress.skipped_steps = self.meter.skipped_steps

    def validation(self, found: Validation) -> None:
        step, samples = self.progress.step, self.progress.consumed_samples
        width = len(str(self.cfg.run.steps))
        self.screen.say(
            f"eval {step:>{width}}/{self.cfg.run.steps} | valid loss {found.loss:.4f} | "
            f"perplexity {math.exp(min(found.loss, 700)):.2f} | {found.tokens} tokens"
        )
        self.journal.write(
            {
                "step": step,
                "consumed_samples": samples,
                "consumed_tokens": samples * self.cfg.batch.seq_length,
                "valid_loss": found.loss if math.isfinite(found.loss) else None,
                "valid_tokens": found.tokens,
            }
        )

    def _watch(self, record: Record) -> None:
        self.skips_in_row = self.skips_in_row + 1 if record.skipped else 0
        if record.skipped:
            self.screen.say(
                f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}: update skipped, "
                f"{record.skipped_steps} so far; {self.skips_in_row} in a row, the run stops at {SKIPS_IN_ROW}"
            )
        if self.skips_in_row >= SKIPS_IN_ROW:
            good = record.step - SKIPS_IN_ROW
            raise Diverged(
                f"loss or gradient norm was not finite in {SKIPS_IN_ROW} steps in a row, {good + 1} to {record.step}. "
                f"Their updates were skipped: the weights are those of step {good}. Usual ways out: a lower optim.lr, "
                f"a longer optim.warmup_steps, optim.clip > 0, other data"
            )
