"""The run folder: everything a run leaves behind, and nowhere else.

    runs/<name>/
        config.toml          the resolved config: alone it reproduces the run
        schedule-3fa2b1c4.txt  copy of the schedule, where that is a file
        plan.json            what was predicted before step 1
        summary.json         what was measured, beside it (written at the end)
        metrics.jsonl        one object a step, one a validation
        tokenizer.json       copy of the tokenizer (or tokenizer.model), with its tokenizer_config.json if there is one
        checkpoints/         step_00000100/ ...
        logs/rank0.log       what was printed, and what each other rank would have: rank1.log, ...
        logs/rank0.out       all that the rank wrote to its terminal, where a launcher has started it
        tensorboard/         events
        traces/              timelines of the steps that run.trace names
        loss.png             the loss curve (written at the end)

One process owns a run folder at a time, rank 0 of a run: it holds a lock on `.lock`, which the kernel frees when the
process ends, however it ends. A new folder whose run ends before its first step is removed again. The other ranks see
the same folder, and write there their logs and their parts of checkpoints.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from megapre.config import load, to_toml
from megapre.errors import UserError

from . import schedule_copy

if TYPE_CHECKING:
    from megapre.config import Config

METRICS = "metrics.jsonl"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class RunFolderError(UserError):
    """The run folder exists already, is in use, cannot be written, or is no run folder."""


class RunFolder:
    """A run folder held for writing, by rank 0; with another `rank`, the same folder in the hands of rank 0.

    Raises RunFolderError as told in the module's text.
    """

    def __init__(self, path: Path, resume: bool, rank: int = 0) -> None:
        self.path, self.rank = path, rank
        self._lock: IO[str] | None = None
        self._resumed = resume
        self._new = False
        self.stepped = False  # set when the first step has been made: from then on the folder stays
        if self.ours:
            self._refuse_used()

    @property
    def ours(self) -> bool:
        """Whether this rank holds the folder, and alone writes what the run as a whole leaves there."""
        return self.rank == 0

    def __enter__(self) -> Self:
        if not self.ours:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(f"run folder {self.path} cannot be written: {error.strerror or error}") from error
        try:
            self._take(self._lock)
        except BaseException:
            self._lock.close()
            raise
        return self

    def _take(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the folder with this file, or have trained in it, since we looked.
            if not os.path.samestat(os.fstat(lock.fileno()), (self.path / ".lock").stat()):
                raise FileNotFoundError("the lock was replaced")
        except OSError as error:
            raise RunFolderError(f"run folder {self.path} is in use by another process") from error
        self._new = not self._refuse_used()
        try:
            for sub in (self.checkpoints, self.path / "logs"):
                sub.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"run folder {self.path} cannot be written: {error.strerror or error}") from error

    def _refuse_used(self) -> bool:
        """Whether there is a run in the folder. Raises RunFolderError if so and it is not to be resumed."""
        path = self.path
        # A launcher's logs are there before the run is.
        used = path.exists() and (not path.is_dir() or any(p.name not in (".lock", "logs") for p in path.iterdir()))
        if used and not self._resumed:
            raise RunFolderError(
                f"run folder {path} exists already; continue that run with --resume, or choose another name=... or "
                f"run.dir=..., or delete the folder"
            )
        return used

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.ours:
            return
        assert self._lock is not None, "left before it was entered"
        if self._new and not self.stepped:
            self._remove()
        self._lock.close()

    def _remove(self) -> None:
        """All but the logs of a launcher, in which the user may look for the reason."""
        for entry in self.path.iterdir():
            if entry.name == "logs":
                for log in entry.glob("rank*.log"):
                    log.unlink(missing_ok=True)
            elif entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.log.parent.rmdir()
            self.path.rmdir()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def log(self) -> Path:
        return self.path / "logs" / f"rank{self.rank}.log"

    def begin(self, cfg: Config, plan: Any, tokenizer: Path | None) -> None:
        """Writes what a run knows before its first step: config.toml, plan.json, copies of tokenizer and schedule."""
        if not self.ours:
            return
        self._write_config(schedule_copy.keep(cfg, self.path))
        self.write_json("plan.json", plan)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, self.path / f"tokenizer{tokenizer.suffix}")
            config = tokenizer.with_name(f"{tokenizer.stem}_config.json")
            if config.is_file():  # may be all that names the end of a document
                shutil.copyfile(config, self.path / "tokenizer_config.json")

    def _write_config(self, cfg: Config) -> None:
        """Writes config.toml. A different one that is there, from before a resume, is kept as config.1.toml, ..."""
        text, file = to_toml(cfg), self.path / "config.toml"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            number = 1 + sum(1 for _ in self.path.glob("config.*.toml"))
            file.rename(self.path / f"config.{number}.toml")
        write_whole(file, text)

    def write_json(self, name: str, value: Any) -> None:
        write_whole(self.path / name, json.dumps(value, indent=1) + "\n")

    def cut_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drops the records after `step` and a torn last line, so that no step is there twice; returns the rest."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        if self.ours and self.metrics.exists():
            write_whole(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return kept


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order; a line that a killed process left unfinished is passed over."""
    file = run / METRICS
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def open_run(path: Path) -> Config:
    """The config of an existing run folder. Raises RunFolderError where there is none."""
    file = path / "config.toml"
    if not file.is_file():
        raise RunFolderError(f"{path} is no run folder: it has no config.toml")
    return load(str(file))


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of the last step that is saved, by its name alone; whether it is whole, megapre.checkpoint tells."""
    saved = [path for path in (run / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return max(saved, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def concluded(run: Path, steps: int) -> int:
    """The step at which the run has ended and was summed up, by the names of its checkpoints, if that leaves none of
    `steps` to do; else 0.
    """
    saved, summary = newest_checkpoint(run), run / "summary.json"
    step = int(saved.name.removeprefix("step_")) if saved else 0
    if step < steps or not summary.is_file():
        return 0
    return step if json.loads(summary.read_text(encoding="utf-8"))["steps"] == step else 0


def tokenizer_file(run: Path) -> Path:
    """The tokenizer's copy in a run folder. Raises RunFolderError where there is none."""
    for name in TOKENIZERS:
        if (run / name).is_file():
            return run / name
    raise RunFolderError(f"run folder {run} holds no tokenizer ({' or '.join(TOKENIZERS)}): its data had none")


def write_whole(file: Path, text: str) -> None:
    """The file has its old content or `text`, never a part of it."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
