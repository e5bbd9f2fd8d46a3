"""`megapre launch local`: the ranks of a run on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megapre.config import Config
from megapre.mesh import Mesh
from megapre.train import cpu_runtime
from megapre.train.folder import RunFolder

from .processes import launch


def run(
    cfg: Config, recipe: str, overrides: Sequence[str], nproc: int = 0, resume: bool = False, grace: float = 300.0
) -> int:
    """Trains `cfg`, which is `recipe` with `overrides`, on `nproc` ranks (0: as many as the layout needs).

    `grace`: seconds that the ranks have to save and end once asked to. Returns the exit code of megapre.train.loop.run.
    Raises MeshError where the layout cannot be cut out of `nproc` ranks, RunFolderError where a run is there already.
    """
    nproc = nproc or cfg.layout.model_parallel * max(cfg.layout.dp, 1)
    mesh = Mesh.of(cfg.layout, nproc)
    cfg.batch.micro_batches(mesh.dp)  # cannot be cut: told once, before anything starts
    folder = RunFolder(Path(cfg.run.dir) / cfg.name, resume)  # in use: the same, and before logs are added to its own
    command = [sys.executable, "-m", "megapre", "train", recipe, *overrides, *(["--resume"] if resume else [])]
    return launch(command, nproc, folder.path / "logs", grace, environment(nproc, cfg.run.threads))


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
