"""A training run from its first line to its last.

`run` reads in the order in which things happen: the ranks, the run folder, the device, the data, the model, where to go
on from, what will run, the steps, the end. What each part does is in the file it comes from. Every rank takes the same
way; what is done once, rank 0 does.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megapre import checkpoint
from megapre.data import build_loader
from megapre.optim.schedules import lr_at
from megapre.parallel.comm import blaming_others, everybody, first_alone, gathered, join, leave, place, together
from megapre.parallel.trace import Trace
from megapre.parallel.tuned import tuned

from . import machine, tracing
from .changes import changes
from .end import conclude
from .evaluate import validate
from .folder import RunFolder, concluded
from .memory import measured, total
from .metrics import Timed
from .planned import box, plan_of
from .report import Diverged, Report
from .save import Progress, Saver
from .screen import Screen
from .settle import settle
from .signals import EXIT_CODES, StopRequest, Vote
from .stage import parameters
from .step import Engine, connected, mesh_of

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from megapre.config import Config
    from megapre.data import Loader
    from megapre.parallel.comm import Place


def run(cfg: Config, resume: bool = False, reorder: bool = False) -> int:
    """Trains `cfg` in the run folder `cfg.run.dir`/`cfg.name`; with `resume` goes on from its newest whole checkpoint,
    and with `reorder` even where that puts the samples into another order.

    This process is the only rank, or one of those that a launcher has started (megapre.parallel.comm.place), which all
    see the same file system.

    Returns the exit code: 0 done, 1 diverged or not saved at the end, 75 (SIGTERM) or 130 (Ctrl-C) stopped after
    saving, or before there was anything to save. An error within the steps is raised again once the last finished step
    is saved. It is not saved after an error amid the next update, which leaves weights of two steps; and one of several
    ranks cannot save alone, and must end at once for the others to know. Raises UserError subclasses for what the user
    can mend, before anything is left behind.
    """
    here = place(os.environ)
    mesh_of(cfg, here)
    device = machine.prepare(cfg.run, here)
    join(here, device, cfg.comm.timeout)
    with blaming_others(here.rank):
        code = _run(cfg, resume, here, device, reorder)
    leave()
    return code


def _run(cfg: Config, resume: bool, here: Place, device: torch.device, reorder: bool = False) -> int:
    with together(everybody(here)):
        folder = RunFolder(Path(cfg.run.dir) / cfg.name, resume, here.rank)
        cfg, tokenizer = settle(cfg)
    chosen = tuned(cfg, here, device)
    cfg = cfg.model_copy(update={"layout": chosen.layout})
    groups = connected(cfg, here, device, chosen.options)
    ranks = groups.world.handle
    with StopRequest() as stop, ExitStack() as entered:
        with together(ranks):
            entered.enter_context(folder)
        screen = entered.enter_context(Screen(folder.log, prints=folder.ours))
        if resume and (step := finished(folder.path, cfg, ranks)):
            screen.say(f"nothing to do: the run is at step {step} of {cfg.run.steps}; a larger run.steps goes on")
            return 0
        with together(ranks):  # machines may differ, and none goes on without the others
            plan = plan_of(cfg, device, groups.mesh, here)
        before = machine.peak_memory(device)
        engine = Engine(cfg, device, groups)
        saver = Saver(engine, folder, screen)
        progress = saver.restore(reorder) if resume else Progress()
        first = progress.step
        dp = groups.dp
        with together(ranks), first_alone(ranks):  # which writes the index files of the samples
            loader = build_loader(cfg, "train", dp.index, dp.size, progress.consumed_samples)
            valid = build_loader(cfg, "valid", dp.index, dp.size) if cfg.run.eval_every else None
        with together(ranks):
            folder.begin(cfg, plan.as_json(), tokenizer)
        if cfg.layout.comm_profile:
            screen.say(f"communication profile {chosen.state}")
        screen.say(box(plan, engine.ops.names, str(folder.path)))
        if resume and saver.saved_step is None:  # below the box, where a mistaken name is seen
            screen.say(f"--resume: {folder.path} holds no checkpoint yet: beginning at step 1")
        vote = Vote(stop, here.world)
        with loader, Report(cfg, device, folder, screen, plan, progress) as report:
            try:
                train(engine, loader, valid, progress, report, saver, vote)
            except Diverged as error:
                screen.say(f"megapre: stopped: {error}")
                keep_diverged(engine, progress, saver, screen)
                return 1
            except Exception:
                rescue(progress, report, saver, screen, alone=here.world == 1)
                raise
        stopped = vote.signal
        if stopped is not None and progress.step == first:
            screen.say(f"stopped by {stopped.name} before a step was made")
            return EXIT_CODES[stopped]
        saved = saver.saved_step == progress.step or saver.save(progress)
        if stopped is None:
            memory = max(gathered(measured(engine, before), ranks), key=total)
            if folder.ours:
                conclude(folder, screen, plan, memory)
            return 0 if saved else 1
        if saved:
            screen.say(f"stopped by {stopped.name} after step {progress.step}; go on with --resume")
            return EXIT_CODES[stopped]
        last = "begins anew" if saver.saved_step is None else f"goes back to step {saver.saved_step}"
        screen.say(
            f"stopped by {stopped.name} after step {progress.step}, but that state could not be saved: --resume {last}"
        )
        return 1


def finished(run: Path, cfg: Config, ranks: dist.ProcessGroup | None) -> int:
    """The step at which the run has ended, if `cfg` leaves it nothing to do and its newest checkpoint is whole; else 0.
    For all ranks to call. Raises ResumeError where `cfg` is of another model.
    """
    step = gathered(concluded(run, cfg.run.steps), ranks)[0]  # as the first rank sees it
    if not step:
        return 0
    changes(run, cfg, reorder=True)  # no sample is left whose order could matter
    try:
        found = checkpoint.newest_verified(run / "checkpoints", ranks=ranks)
    except checkpoint.CheckpointError:  # which the restoring tells
        return 0
    return step if found is not None and found.facts["step"] == step else 0


def keep_diverged(engine: Engine, progress: Progress, saver: Saver, screen: Screen) -> None:
    """Saves the weights of a run that has diverged, if they are whole: skipped updates leave them as they were."""
    engine.settle()
    finite = all(bool(parameter.isfinite().all()) for _, parameter in parameters(engine.models))
    if not all(gathered(finite, engine.groups.world.handle)):
        screen.say("the weights themselves are not finite: not saved")
    elif saver.saved_step != progress.step:
        saver.save(progress)


def rescue(progress: Progress, report: Report, saver: Saver, screen: Screen, alone: bool) -> None:
    """Writes out and, on the only rank, saves what the finished steps of a run have made before an error ends it.

    What fails here as well, as after a device error, is told and does not hide the first error.
    """
    try:
        report.flush()
    except Exception as error:
        screen.say(f"the last steps could not be reported: {error}")
    unsaved, whole = progress.step > (saver.saved_step or 0), saver.engine.whole
    if unsaved and not (alone and whole):
        last = "begins anew" if saver.saved_step is None else f"goes back to step {saver.saved_step}"
        why = "which all ranks would have to do"
        if not whole:
            why = f"for the error came amid the update of step {progress.step + 1}, and the weights are of both"
        screen.say(f"step {progress.step} is not saved, {why}: --resume {last}")
    elif unsaved:
        try:
            saver.save(progress)
        except Exception as error:
            screen.say(f"step {progress.step} could not be saved: {error}")


def train(
    engine: Engine,
    loader: Loader,
    valid: Loader | None,
    progress: Progress,
    report: Report,
    saver: Saver,
    vote: Vote,
) -> None:
    """Steps until the last one or until the ranks stop. `progress` is always that of the last finished step."""
    cfg, device = engine.cfg, engine.device
    first = progress.step + 1
    stops = None
    while progress.step < cfg.run.steps and not vote.passed(stops):
        begin = machine.now(device)
        batch = next(loader)
        lr = lr_at(progress.step + 1, cfg.optim, cfg.run.steps)
        trace = Trace(engine.groups.world, device) if progress.step + 1 in cfg.run.trace else None
        result = engine.step(batch, lr, trace, vote.asked)
        stops = result.stops
        progress.step += 1
        progress.consumed_samples += batch.samples
        report.add(Timed(progress.step, lr, result, begin, machine.now(device)))

        last = progress.step == cfg.run.steps
        if trace is not None:
            tracing.write(trace, progress.step, engine, saver.folder, saver.screen)
        if last or progress.step == first or due(progress.step, cfg.run.log_every):
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
