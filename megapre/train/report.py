"""Tells the world how a run goes: step lines on the screen, objects in the journal. Stops a run that has diverged."""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING, Self

from megapre.optim.scaling import SMALLEST

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
RUNNING = {"cuda": 1, "cpu": 0}  # steps that a device keeps to work on while earlier ones are looked at


class Diverged(RuntimeError):
    """Several steps in a row had a loss or gradient norm that was not finite."""


class Report:
    """Collects timed steps and writes them out: to the journal at least every SKIPS_IN_ROW steps, so that divergence
    is seen soon however rarely the run logs, to the screen when asked to. Of several ranks each has one, and all see
    the same losses, so that all stop a diverged run at the same step; rank 0 keeps the journal.
    """

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        folder: RunFolder,
        screen: Screen,
        plan: Plan,
        progress: Progress,
    ) -> None:
        self.cfg, self.folder, self.screen, self.progress = cfg, folder, screen, progress
        self.meter = Meter(device, cfg.batch.global_, cfg.batch.seq_length, plan.mfu, progress.skipped_steps)
        earlier = [r["loss"] for r in read_metrics(folder.path) if r.get("loss") is not None]
        self.line = StepLine(cfg.run.steps, device, plan.mesh.world, earlier)
        metrics, events = folder.metrics, folder.path / "tensorboard"
        self.journal = Journal(
            metrics if folder.ours else None,
            events if folder.ours and cfg.run.tensorboard else None,
            screen.say,
            purge_step=progress.step + 1,
        )
        self.newest = ""  # line of the newest step that the journal has and the screen does not
        self.updated = progress.step  # the last step that changed the weights
        self.skips_in_row = 0

    def __enter__(self) -> Self:
        self.screen.begin(self.progress.step, self.cfg.run.steps)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.screen.finish()
        self.journal.close()

    def add(self, step: Timed) -> None:
        """Takes the step that `progress` has just counted. Raises Diverged."""
        self.folder.stepped = True
        self.meter.add(step)
        self.screen.advance(step.step)
        if len(self.meter.waiting) >= SKIPS_IN_ROW:
            self._watch(self._record(RUNNING[self.meter.device.type]))

    def flush(self) -> None:
        """Writes out every step that has gathered; the newest gets the step line. Raises Diverged."""
        records = self._record()
        if self.newest:
            self.screen.say(self.newest)
            self.newest = ""
        self._watch(records)

    def _record(self, running: int = 0) -> list[Record]:
        """Moves what has gathered, but for the newest `running` steps, into the journal, all of it before anything is
        made of it."""
        records = self.meter.collect(self.progress.consumed_samples, running)
        self.progress.skipped_steps = self.meter.skipped_steps
        for record in records:
            self.newest = self.line.see(record)
            self.journal.write(record.as_json())
        return records

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

    def _scale_can_fall(self, record: Record) -> bool:
        """Whether a skipped step is loss scaling at its work: a whole loss, and a scale that has room below."""
        dynamic = record.loss_scale is not None and self.cfg.optim.loss_scale == 0
        return dynamic and math.isfinite(record.loss) and (record.loss_scale or 0.0) > SMALLEST

    def _watch(self, records: list[Record]) -> None:
        lost = None
        for record in records:
            if not record.skipped:
                self.updated, self.skips_in_row = record.step, 0
                continue
            if self._scale_can_fall(record):  # which ends: every skipped step halves it
                self.skips_in_row = 0
                self.screen.say(
                    f"step {record.step}: the gradients left fp16 with the loss scaled by {record.loss_scale:.10g}: "
                    f"update skipped, {record.skipped_steps} so far, scale halved"
                )
                continue
            self.skips_in_row += 1
            self.screen.say(
                f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}: update skipped, "
                f"{record.skipped_steps} so far; {self.skips_in_row} in a row, the run stops at {SKIPS_IN_ROW}"
            )
            if self.skips_in_row == SKIPS_IN_ROW:
                lost = record
        if lost is not None:
            raise Diverged(self._how_it_diverged(lost))

    def _how_it_diverged(self, last: Record) -> str:
        steps = f"{last.step - SKIPS_IN_ROW + 1} to {last.step}"
        ways = "a lower optim.lr, a longer optim.warmup_steps, optim.clip > 0, other data"
        if last.loss_scale is not None:
            steps += f", the last with its loss scaled by {last.loss_scale:.10g}"
            fixed = self.cfg.optim.loss_scale > 0
            ways += ", optim.loss_scale 0 (dynamic)" if fixed else ", a new run with run.dtype bf16"
        return (
            f"loss or gradient norm was not finite in {SKIPS_IN_ROW} steps in a row, {steps}. Their updates were "
            f"skipped: the weights are as step {self.updated} left them. Usual ways out: {ways}"
        )
