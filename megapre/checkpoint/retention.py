"""Which checkpoints stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from .commit import CheckpointError, committed, retire, verify


def retain(checkpoints: Path, keep: int, whole: Path | None = None) -> list[Path]:
    """Removes all but the `keep` newest checkpoints (0 = none is removed) and what killed saves left behind.

    The newest *verified* checkpoint always stays: when all of the `keep` newest are damaged, older ones are removed
    only down to the first whole one. `whole` is known to be so, for instance just committed, and not read again.
    Returns what was removed.
    """
    for leftover in checkpoints.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep == 0:
        return []
    all_of_them = committed(checkpoints)
    newest_whole = next((i for i, path in enumerate(all_of_them) if path == whole or _is_whole(path)), len(all_of_them))
    doomed = [path for i, path in enumerate(all_of_them) if i >= keep and i > newest_whole]
    for path in doomed:
        retire(path)
    return doomed


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except (CheckpointError, OSError):
        return False
    return True
