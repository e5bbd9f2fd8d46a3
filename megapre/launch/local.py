"""`megapre launch local`: the ranks of a run on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megapre.config import Config
from megapre.mesh import Mesh
from megapre.plan.partition import schedule_of
from megapre.train import cpu_runtime
from megapre.train.changes import changes
from megapre.train.folder import RunFolder, concluded, newest_checkpoint
from megapre.train.moved import refuse_moved
from megapre.train.settle import settle

from .processes import REFUSED, STOPPED, launch


def run(
    cfg: Config,
    recipe: str,
    overrides: Sequence[str],
    nproc: int = 0,
    resume: bool = False,
    reorder: bool = False,
    grace: float = 300.0,
) -> int:
    """Trains `cfg`, which is `recipe` with `overrides`, on `nproc` ranks (0: as many as the layout needs).

    `grace`: seconds that the ranks have to save and end once asked to. Returns the exit code of megapre.train.loop.run.
    What arithmetic and the file system can tell is told once, before anything starts or is written. Raises MeshError
    where the layout cannot be cut out of `nproc` ranks, ConfigError where the batch cannot be cut, ScheduleError for
    what is no schedule of the layout, RunFolderError where a run is there already or the recipe's was moved,
    DataError for data that are missing or broken, ResumeError where it cannot go on with `cfg`.
    """
    refuse_moved(recipe, cfg, overrides)
    nproc = nproc or cfg.layout.model_parallel * max(cfg.layout.dp, 1)
    mesh = Mesh.of(cfg.layout, nproc)
    schedule_of(cfg, mesh.dp)
    folder = RunFolder(Path(cfg.run.dir) / cfg.name, resume)
    settled, _ = settle(cfg)
    if resume:
        changes(folder.path, settled, reorder or concluded(folder.path, cfg.run.steps) > 0)
    options = [*(["--resume"] if resume else []), *(["--reorder-data"] if reorder else [])]
    command = [sys.executable, "-m", "megapre", "train", recipe, *overrides, *options]
    code = launch(command, nproc, folder.path / "logs", grace, environment(nproc, cfg.run.threads))
    if code not in (0, REFUSED, *STOPPED):
        print(f"megapre: {way_on(folder)}", file=sys.stderr, flush=True)
    return code


def way_on(folder: RunFolder) -> str:
    """What to do after a run was cut off."""
    if (newest := newest_checkpoint(folder.path)) is not None:
        return f"--resume goes back to the last whole checkpoint in {folder.checkpoints}; the newest is {newest.name}"
    if (folder.path / "config.toml").exists():
        return f"no checkpoint was saved: --resume begins {folder.path} anew"
    return "the run had not begun; there is nothing to resume"


def run_verb(words: Sequence[str], nproc: int, grace: float) -> int:
    """Runs `megapre WORDS...`, such as bench comm, as `nproc` ranks. Their logs are in runs/bench-comm/logs."""
    command = [sys.executable, "-m", "megapre", *words]
    return launch(command, nproc, Path("runs") / "-".join(words[:2]) / "logs", grace, environment(nproc, 0))


def environment(nproc: int, threads: int) -> dict[str, str]:
    """The environment of every rank: ours, and its share of the cores unless run.threads or the user has decided.

    Gloo gets the loopback: all ranks are here, and the name of the machine need not resolve.
    """
    ours = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if sys.platform.startswith("linux"):
        ours.setdefault("GLOO_SOCKET_IFNAME", "lo")
    number = cpu_runtime.decide_threads(threads, cpu_runtime.look(), os.environ).number
    if nproc > 1 and number and not threads:
        ours["OMP_NUM_THREADS"] = str(max(number // nproc, 1))
    return ours
