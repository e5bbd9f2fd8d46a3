"""A training run from its first line to its last.

`run` reads in the order in which things happen: the run folder, the device, the data, the model, where to go on from,
what will run, the steps, the end. What each part does is in the file it comes from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megapre.data import build_loader
from megapre.optim.schedules import lr_at

from . import machine
from .end import conclude
from .evaluate import validate
from .folder import RunFolder
from .metrics import Timed
from .planned import box, plan_of
from .report import Diverged, Report
from .save import Progress, Saver
from .screen import Screen
from .settle import settle
from .signals import EXIT_CODES, StopRequest
from .step import Engine

if TYPE_CHECKING:
    from megapre.config import Config
    from megapre.data import Loader


def run(cfg: Config, resume: bool = False) -> int:
    """Trains `cfg` in the run folder `cfg.run.dir`/`cfg.name`; with `resume` goes on from its newest whole checkpoint.

    Returns the exit code: 0 done, 1 diverged or not saved at the end, 75 (SIGTERM) or 130 (Ctrl-C) stopped after
    saving. Raises UserError subclasses for what the user can mend, before anything is left behind.
    """
    folder = RunFolder(Path(cfg.run.dir) / cfg.name, resume)
    device = machine.prepare(cfg.run)
    cfg, tokenizer = settle(cfg)
    with folder, Screen(folder.log) as screen:
        plan = plan_of(cfg, device)
        before = machine.peak_memory(device)
        engine = Engine(cfg, device)
        saver = Saver(engine, folder, screen)
        progress = saver.restore() if resume else Progress()
        loader = build_loader(cfg, "train", consumed_samples=progress.consumed_samples)
        valid = build_loader(cfg, "valid") if cfg.run.eval_every else None
        folder.begin(cfg, plan.as_json(), tokenizer)
        screen.say(box(plan, engine.ops.names, str(folder.path)))
        with StopRequest() as stop, Report(cfg, device, folder, screen, plan, progress) as report:
            try:
                train(engine, loader, valid, progress, report, saver, stop)
            except Diverged as error:
                screen.say(f"megapre: stopped: {error}")
                return 1
            saved = saver.saved_step == progress.step or saver.save(progress)
        if stop.signal is not None:
            screen.say(f"stopped by {stop.signal.name} after step {progress.step}; go on with --resume")
            return EXIT_CODES[stop.signal]
        conclude(folder, screen, plan, before)
        return 0 if saved else 1


def train(
    engine: Engine,
    loader: Loader,
    valid: Loader | None,
    progress: Progress,
    report: Report,
    saver: Saver,
    stop: StopRequest,
) -> None:
    """Steps until the last one or until asked to stop. `progress` is always that of the last finished step."""
    cfg, device = engine.cfg, engine.device
    while progress.step < cfg.run.steps and stop.signal is None:
        begin = machine.now(device)
        batch = next(loader)
        lr = lr_at(progress.step + 1, cfg.optim, cfg.run.steps)
        result = engine.step(batch, lr)
        progress.step += 1
        progress.consumed_samples += batch.samples
        report.add(Timed(progress.step, lr, result, begin, machine.now(device)))

        last = progress.step == cfg.run.steps
        if last or due(progress.step, cfg.run.log_every):
            report.flush()
        if valid is not None and (last or due(progress.step, cfg.run.eval_every)):
            report.flush()
            report.validation(validate(engine, valid))
        if due(progress.step, cfg.checkpoint.every) and not last:
            report.flush()
            saver.save(progress)
    report.flush()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
