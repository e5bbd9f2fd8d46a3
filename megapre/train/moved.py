"""A run folder that was moved, started by its own config.toml, which still names the old place.

Without a word the run would begin again there, at step 1, where its checkpoints are no more.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .folder import METRICS, RunFolderError

if TYPE_CHECKING:
    from megapre.config import Config


def refuse_moved(recipe: str, cfg: Config, overrides: Sequence[str]) -> None:
    """Raises RunFolderError where `recipe` is the config.toml of a run folder and `cfg`, which is `recipe` with
    `overrides`, names a run elsewhere: unless a `name` or `run.dir` among them that is not this folder's asks for that.
    """
    file, named = Path(recipe), Path(cfg.run.dir) / cfg.name
    here = file.parent if file.parent.name not in ("", "..") else file.parent.resolve()
    trained = (here / "checkpoints").is_dir() or (here / METRICS).is_file()
    if file.name != "config.toml" or not trained or here.resolve() == named.resolve():
        return
    keys = {override.partition("=")[0].strip() for override in overrides}
    if "name" in keys and cfg.name != here.name:
        return
    if "run.dir" in keys and Path(cfg.run.dir).resolve() != here.resolve().parent:
        return
    raise RunFolderError(
        f"{recipe} is of the run in {here}, but the run that it names would be in {named}: the folder was moved or "
        f"copied, or this is not where it was started. To go on with the run in {here} add "
        f"{shlex.quote(f'run.dir={here.parent}')} {shlex.quote(f'name={here.name}')}; for a new run choose another "
        f"name=..."
    )
