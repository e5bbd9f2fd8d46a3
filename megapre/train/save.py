"""A run's checkpoints: writing them without endangering the run, and going on from the newest whole one."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from megapre import checkpoint
from megapre.checkpoint.state import training_tensors
from megapre.data import DataError
from megapre.data.order import compare_order, order_facts

from .changes import ResumeError, changes
from .metrics import bytes_text, duration_text

if TYPE_CHECKING:
    from megapre.checkpoint.pieces import Pieces

    from .folder import RunFolder
    from .screen import Screen
    from .step import Engine


@dataclass
class Progress:
    """How far a run is. With the config, all that data order and learning rate depend on."""

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0


class Saver:
    def __init__(self, engine: Engine, folder: RunFolder, screen: Screen) -> None:
        self.engine, self.folder, self.screen = engine, folder, screen
        self.order = order_facts(engine.cfg)  # of the data that the run began with, whatever becomes of the files
        self.saved_step: int | None = None

    def save(self, progress: Progress) -> bool:
        """Commits a checkpoint and removes the oldest beyond `checkpoint.keep`; for all ranks to call. A failure is
        reported, not raised.
        """
        begin = time.perf_counter()
        engine, cfg = self.engine, self.engine.cfg
        assert engine.whole, f"weights of step {progress.step} and of the next are mixed"
        engine.settle()
        try:
            facts = asdict(progress) | {"data": self.order}
            ranks = engine.groups.world.handle
            path = checkpoint.save(self.folder.checkpoints, progress.step, self._tensors(), facts, ranks)
        except (checkpoint.CheckpointError, OSError) as error:
            self.screen.say(f"checkpoint failed, training goes on: {error}")
            return False
        self.saved_step = progress.step
        if not self.folder.ours:
            return True
        try:
            removed = checkpoint.retain(self.folder.checkpoints, cfg.checkpoint.keep, whole=path)
        except OSError as error:
            removed = []
            self.screen.say(f"older checkpoints could not be removed: {error}")
        size = bytes_text(sum(file.stat().st_size for file in path.iterdir()))
        gone = f", removed {', '.join(p.name for p in removed)}" if removed else ""
        self.screen.say(f"saved {path} ({size}, {duration_text(time.perf_counter() - begin)}{gone})")
        return True

    def _tensors(self) -> dict[str, Pieces]:
        engine = self.engine
        return training_tensors(engine.cfg.model, engine.flat, engine.optimizer, engine.loss_scale, engine.groups)

    def restore(self, reorder: bool = False) -> Progress:
        """Loads the newest whole checkpoint into the engine and cuts metrics.jsonl back to it; for all ranks to call.

        A run without any checkpoint begins at its first step. Raises ResumeError where the config now describes another
        model, or data or steps with which the samples would be others or, unless `reorder`, come in another order, and
        CheckpointError where there are checkpoints but none is whole.
        """
        engine = self.engine
        if changed := changes(self.folder.path, engine.cfg, reorder):
            self.screen.say(f"resuming with changes: {'; '.join(changed)}")
        ranks = engine.groups.world.handle
        manifest = checkpoint.newest_verified(self.folder.checkpoints, self.screen.say, ranks)
        if manifest is None:
            self.folder.cut_metrics(0)
            return Progress()
        facts = manifest.facts
        try:
            if "data" in facts:  # absent from the checkpoints of early versions
                compare_order(facts["data"], engine.cfg, reorder)
        except DataError as error:
            raise ResumeError(f"the run {self.folder.path} cannot go on: {error}") from error
        checkpoint.load(manifest, self._tensors())
        progress = Progress(facts["step"], facts["consumed_samples"], facts["skipped_steps"])
        self.folder.cut_metrics(progress.step)
        self.saved_step = progress.step
        self.screen.say(f"going on from {manifest.path}, {progress.consumed_samples} samples consumed")
        return progress
