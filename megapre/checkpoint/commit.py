"""Writing a checkpoint so that it exists whole or not at all, and reading it only when it is whole.

A checkpoint is written into `.step_00000100.partial`, every file and the folder are flushed to the disk, sizes and
SHA-256 go into manifest.json, and one rename makes it `step_00000100`. A process killed at any point leaves a dot
folder that no reader looks at. What the rename cannot promise (a disk that loses or flips bytes later) the checksums
find: `verify` names the file, `newest_verified` goes on to the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megapre.errors import UserError
from megapre.parallel.comm import CommError, gathered, rank_in, together

from .pieces import Pieces, whole

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1
_COMMITTED = re.compile(r"step_(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint could not be written, is damaged, or does not fit what it is loaded into."""


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says of itself. `facts` are its caller's JSON values: step, consumed_samples, ..."""

    path: Path
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def step(self) -> int:
        return int(self.facts["step"])


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def committed(checkpoints: Path) -> list[Path]:
    """Committed checkpoint folders, newest step first. By step, never by clock: clocks jump."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), p) for p in checkpoints.iterdir() if (m := _COMMITTED.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def save(
    checkpoints: Path,
    step: int,
    tensors: Mapping[str, Tensor | Pieces],
    facts: Mapping[str, Any],
    ranks: dist.ProcessGroup | None = None,
) -> Path:
    """Commits `tensors` (by name, any device) and `facts` (JSON values) as the checkpoint of `step`; returns its
    folder. To be called on all of `ranks`, which see the same file system; the first of them commits.

    Raises CheckpointError, on every rank, when anything cannot be written, after removing what was; earlier
    checkpoints stay intact.
    """
    final = folder_of(checkpoints, step)
    partial = checkpoints / f".{final.name}.partial"
    alone = ranks is None
    try:
        with together(ranks) as first:
            if first:
                checkpoints.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
        with _torch_checkpoint() as (dcp, planners):
            writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
            planner = planners.SavePlanner(_as_pieces(tensors))
            dcp.save({}, storage_writer=writer, planner=planner, process_group=ranks, no_dist=alone)
        with together(ranks):
            own = {p.name: _fingerprint(p) for p in sorted(partial.iterdir()) if _writer_of(p) == rank_in(ranks)}
        files = {name: facts for part in gathered(own, ranks) for name, facts in part.items()}
        with together(ranks) as first:
            if first:
                _write_manifest(partial, {**facts, "step": step}, files)
                _fsync(partial)
                if final.exists():  # a damaged one of the same step, that a resumed run has now computed again
                    retire(final)
                partial.rename(final)
                _fsync(checkpoints)
    except (OSError, RuntimeError, CheckpointError, CommError) as error:
        if rank_in(ranks) == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {step} could not be written to {checkpoints}: {error}") from error
    return final


def _writer_of(file: Path) -> int:
    """The rank that has written a file; __3_0.distcp is of rank 3, the index of rank 0."""
    found = re.fullmatch(r"__(\d+)_\d+\.distcp", file.name)
    return int(found[1]) if found else 0


def _as_pieces(tensors: Mapping[str, Tensor | Pieces]) -> dict[str, Pieces]:
    return {name: tensor if isinstance(tensor, Pieces) else whole(tensor) for name, tensor in tensors.items()}


def verify(path: Path, ranks: dist.ProcessGroup | None = None) -> Manifest:
    """Reads the manifest of a committed checkpoint and compares every file with it; of several `ranks`, all of which
    must call this, each compares its share.

    Raises CheckpointError on every rank, naming the first file that is missing, truncated or damaged.
    """
    problem, manifest = "", None
    try:
        manifest = _read_manifest(path)
        _compare(manifest, rank_in(ranks), 1 if ranks is None else dist.get_world_size(ranks))
    except (CheckpointError, OSError) as error:
        problem = str(error)
    if problems := [text for text in gathered(problem, ranks) if text]:
        raise CheckpointError(problems[0])
    assert manifest is not None, "no manifest and no problem"
    return manifest


def _compare(manifest: Manifest, share: int, shares: int) -> None:
    """Reads every `shares`-th file of a checkpoint, from file `share` on. Raises CheckpointError."""
    path = manifest.path
    present = {p.name for p in path.iterdir()} - {MANIFEST}
    if missing := sorted(manifest.files.keys() - present):
        raise CheckpointError(f"{path / missing[0]}: missing")
    for name, expected in islice(manifest.files.items(), share, None, shares):
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path / name}: {size} bytes, the manifest says {expected['bytes']}")
        if _fingerprint(path / name)["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{path / name}: its SHA-256 differs from the manifest's, the file is damaged")


def newest_verified(
    checkpoints: Path, report: Callable[[str], None] = lambda _: None, ranks: dist.ProcessGroup | None = None
) -> Manifest | None:
    """The newest checkpoint whose every byte is as written, None when there is no checkpoint at all. To be called on
    all of `ranks`; each reads its share of the files.

    Each damaged one on the way is told to `report`. Raises CheckpointError when there are some and none is whole.
    """
    problems = []
    for path in gathered(committed(checkpoints), ranks)[0]:  # as the first rank sees them
        try:
            return verify(path, ranks)
        except CheckpointError as error:
            problems.append(str(error))
            report(f"skipping a damaged checkpoint: {error}")
    if problems:
        raise CheckpointError(f"no checkpoint in {checkpoints} is whole: {'; '.join(problems)}")
    return None


def load(manifest: Manifest, tensors: Mapping[str, Tensor | Pieces]) -> None:
    """Fills `tensors` in place from a verified checkpoint, each rank what it holds; names beyond these are left alone.

    Raises CheckpointError when a name is missing there or has another shape.
    """
    wanted = _as_pieces(tensors)
    with _torch_checkpoint() as (dcp, planners):
        reader = dcp.FileSystemReader(manifest.path)
        held = reader.read_metadata().state_dict_metadata
        for name, tensor in wanted.items():
            if name not in held:
                raise CheckpointError(f"{manifest.path} holds no tensor {name!r}: it belongs to another model or dtype")
            if tuple(held[name].size) != tensor.shape:
                raise CheckpointError(
                    f"{manifest.path}: {name} has shape {list(held[name].size)}, this model needs {list(tensor.shape)}"
                )
        dcp.load({}, storage_reader=reader, planner=planners.LoadPlanner(wanted), no_dist=True)


def retire(path: Path) -> None:
    """Removes a committed checkpoint: out of sight by one rename first, so that half a folder never counts."""
    hidden = path.with_name(f".{path.name}.removing")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _own_checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    body = {"format": FORMAT, "facts": facts, "files": files}
    text = json.dumps({**body, "sha256": _own_checksum(body)}, indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> Manifest:
    try:
        body = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        checksum = body.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: missing or unreadable ({error})") from error
    if checksum != _own_checksum(body):
        raise CheckpointError(f"{path / MANIFEST}: its own checksum does not match, the file is damaged")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format {body['format']}, this megapre reads format {FORMAT}")
    return Manifest(path, body["facts"], body["files"])


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _torch_checkpoint() -> Iterator[Any]:
    """torch.distributed.checkpoint without its chatter, and with its exception (a BaseException) as an ordinary one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from . import planners

    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield dcp, planners
    except CheckpointException as error:
        causes = "; ".join(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values())
        raise CheckpointError(causes or str(error)) from error
    finally:
        logger.setLevel(level)
