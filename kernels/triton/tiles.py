"""Tiles of attention: which could run, by arithmetic, and which of them was measured to be the fastest here.

The default tiles are one table for all GPUs. `python benchmarks/tune_attention.py` measures the others that fit and
writes the fastest of each kind into a small file of the user's, beside the profile of kernels; what it says for the GPU
and the release of Triton at hand is used from the next start on. MEGAPRE_KERNEL_PROFILE=off passes over it.

A tile must fit in shared memory, in registers, and into the shapes of tensor cores. With D the head dim, and s stages
of what is loaded ahead, the kernels hold

    kind        in shared memory, elements               in registers, fp32 numbers of all threads
    forward     q: M D;       k and v: s 2 N D           o: M D,          scores: M N
    keys        k and v: 2 N D; q and do: s 2 M D        dk and dv: 2 N D, scores and their gradient: 2 M N
    queries     q and do: 2 M D; k and v: s 2 N D        dq: M D,         scores and their gradient: 2 M N

for M queries and N keys. The first column is what Triton allocates, to within 1 KiB (the ahead-of-time table shows it).
"""

import functools
import json
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from .. import profile

FORMAT = 1
SHARED = 227 * 1024  # bytes that a block may have on sm_90 and sm_100
NUMBERS = 192  # of a thread's 255 registers: the rest holds operands and addresses


class Tiles(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


class Kind(NamedTuple):
    """Of a kernel: "forward", "keys" (dK, dV) or "queries" (dQ), for heads of so many dims and bytes an element.
    dense: without documents or a window.
    """

    kernel: str
    head_dim: int
    element_size: int
    dense: bool

    @property
    def label(self) -> str:
        return f"{self.kernel} {self.head_dim} {self.element_size} {'dense' if self.dense else 'masked'}"


def shared_bytes(kind: Kind, tiles: Tiles) -> int:
    """Of the tensors' tiles; Triton adds less than 1 KiB."""
    depth = _depth(kind)
    of_queries, of_keys = tiles.queries * depth, tiles.keys * depth
    held, loaded = {
        "forward": (of_queries, 2 * of_keys),
        "keys": (2 * of_keys, 2 * of_queries),
        "queries": (2 * of_queries, 2 * of_keys),
    }[kind.kernel]
    return kind.element_size * (held + tiles.stages * loaded)


def _depth(kind: Kind) -> int:
    """The head dim as tiles have it: a power of two."""
    return 1 << (max(kind.head_dim, 16) - 1).bit_length()


def numbers(kind: Kind, tiles: Tiles) -> int:
    """fp32 numbers that a thread keeps in registers."""
    depth = _depth(kind)
    scores = tiles.queries * tiles.keys
    of_all = {
        "forward": tiles.queries * depth + scores,
        "keys": 2 * tiles.keys * depth + 2 * scores,
        "queries": tiles.queries * depth + 2 * scores,
    }[kind.kernel]
    return of_all // (32 * tiles.warps)


def candidates(kind: Kind, shared: int = SHARED) -> Iterator[Tiles]:
    """The tiles of 16-bit tensors that fit a block with `shared` bytes, those with the most products a load first.

    A warp takes 16 rows and 64 columns of the result or more; its rows are queries or, of dK and dV, keys.
    """
    found = []
    columns = max(_depth(kind) // 64, 1)
    for sizes in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        tiles = Tiles(*sizes)
        rows = tiles.keys if kind.kernel == "keys" else tiles.queries
        fits = shared_bytes(kind, tiles) + 1024 <= shared and numbers(kind, tiles) <= NUMBERS
        if fits and rows // 16 * columns >= tiles.warps:
            found.append(tiles)
    yield from sorted(found, key=lambda t: (-t.queries * t.keys / (t.queries + t.keys), t.warps, t.stages))


@functools.cache
def shared_here() -> int:
    """Bytes of shared memory that a block may have on the GPU at hand; SHARED where there is none."""
    if not torch.cuda.is_available():
        return SHARED
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(gpu.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.cache
def within(kind: Kind, default: Tiles) -> Tiles:
    """The default tiles, or where their memory is not there (99 KiB on sm_86, sm_89 and sm_120) the first that fit."""
    room = shared_here()
    if shared_bytes(kind, default) + 1024 <= room:
        return default
    return next(candidates(kind, room), default)


def tune(kind: Kind, seconds: Callable[[Tiles], float], shared: int = SHARED) -> tuple[Tiles, dict[Tiles, float]]:
    """The fastest candidate and what each took. `seconds` is infinite for one that does not run."""
    times = {tiles: seconds(tiles) for tiles in candidates(kind, shared)}
    return min(times, key=lambda tiles: times[tiles]), times


def path() -> Path | None:
    """The file of what was measured; None where profiles are turned off."""
    beside = profile.path()
    return None if beside is None else beside.with_name("attention-tiles.json")


def here() -> str:
    """What times depend on: the GPU and the compiler."""
    import triton

    return f"{profile.hardware('cuda')}, triton {triton.__version__}"


def write(found: dict[Kind, Tiles]) -> Path:
    """Puts `found` beside what the file says of other kinds and machines; the path. ValueError where there is none."""
    file = path()
    if file is None:
        raise ValueError("MEGAPRE_KERNEL_PROFILE=off turns measured tiles off; unset it to write them")
    known = _read(file)
    known.setdefault(here(), {}).update({kind.label: list(tiles) for kind, tiles in found.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"format": FORMAT, "tiles": known}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
    measured.cache_clear()
    return file


@functools.cache
def measured(kind: Kind) -> Tiles | None:
    """The tiles that were measured for the GPU at hand; None where nothing was, or there is no GPU."""
    file = path()
    if file is None or not torch.cuda.is_available():
        return None
    found = _read(file).get(here(), {}).get(kind.label)
    tiles = None if found is None else Tiles(*found)
    return tiles if tiles is None or tiles in candidates(kind) else None


def _read(file: Path) -> dict[str, dict[str, list[int]]]:
    """What the file says; nothing where it is not there or of another format."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {
            machine: {label: [int(number) for number in tiles] for label, tiles in kinds.items() if len(tiles) == 4}
            for machine, kinds in content["tiles"].items()
            if content["format"] == FORMAT
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
