"""Index arrays on disk: built once, then mapped by every process of every run that asks for the same.

The name of an entry is a hash of everything that its arrays depend on, so an entry is never stale. It appears by one
rename; of several processes that build the same entry, one wins and the others map the winner's.
"""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

FORMAT = 1  # part of every key: raise it when the arrays of the same inputs change


def digest(*inputs: object) -> str:
    """A name for a tuple of plain values and arrays; arrays count by dtype, shape and content."""
    hasher = hashlib.sha256(f"megapre index {FORMAT}".encode())
    for value in inputs:
        if isinstance(value, np.ndarray):
            hasher.update(f"|{value.dtype.str}{value.shape}".encode())
            hasher.update(np.ascontiguousarray(value).data)
        else:
            hasher.update(f"|{value!r}".encode())
    return hasher.hexdigest()[:32]


def cached(
    folder: Path | None, required: bool, key: str, names: Sequence[str], build: Callable[[], Sequence[NDArray]]
) -> list[NDArray]:
    """The arrays that `build` returns, called `names`, mapped from `folder`; built first where they are not there.

    No folder: built in memory. A folder that cannot be written raises DataError if `required`, else it is warned of and
    the arrays stay in memory.
    """
    if folder is None:
        return list(build())
    entry = folder / key
    if (found := _load(entry, names)) is not None:
        return found
    arrays = list(build())
    try:
        _store(entry, dict(zip(names, arrays, strict=True)))
    except OSError as error:
        message = f"index cache {folder} cannot be written: {error.strerror or error}"
        if required:
            raise DataError(f"{message}; set data.index_cache to a folder that can") from error
        warnings.warn(f"{message}; the sample index is built in memory", stacklevel=2)
        return arrays
    return _load(entry, names) or arrays


def _load(entry: Path, names: Sequence[str]) -> list[NDArray] | None:
    try:
        return [np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r")) for name in names]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):  # damaged, for instance cut short by a full disk: build it anew
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _store(entry: Path, arrays: Mapping[str, NDArray]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        for name, array in arrays.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep other users of the data out
        try:
            os.rename(temporary, entry)
        except OSError:
            if not entry.exists():  # else another process was first, and its arrays are the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
