"""Builds csrc/cuda for the host: the same sources, compiled by g++ against tests/cuda/emulator/.

The emulated ops are torch.ops.megapre_emulated.*, on CPU tensors, with the schemas of torch.ops.megapre.*. Shared
memory and what the ops allocate start as NaN; what lies beyond the end of a tensor made by them, or by `guarded`,
cannot be read or written.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from megapre.kernels import library, native

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "megapre_emulated"
HERE = ROOT / "tests" / "cuda" / "emulator"
SOURCES = ROOT / "csrc" / "cuda"
# Undefined and misaligned operations trap, and machine.cpp says where. -O1: compiled in seconds, and ten times as fast
# as without. A product and the sum that takes it are fused into one operation, as nvcc does.
FLAGS = (
    *("-mfma", "-ffp-contract=fast"),
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
)


def build(sources: Path = SOURCES, namespace: str = NAMESPACE) -> Path:
    """The library of the .cu files in `sources`; compiled anew is what has changed since it was last built.

    RuntimeError with what the compiler says when it does not compile.
    """
    command = ["g++", *FLAGS, *(f"-isystem{path}" for path in include_paths()), f"-I{HERE}"]
    place = [f"-DMEGAPRE_OPS_NAMESPACE={namespace}", "-DMEGAPRE_OPS_KEY=CPU"]
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # of the processes that run tests, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        units = {path: [*command, f"-I{sources}", *place] for path in sorted(sources.glob("*.cu"))}
        units |= {path: [*command, *(place if path.stem == "python" else [])] for path in sorted(HERE.glob("*.cpp"))}
        headers = {path.suffix: _texts(HERE, *([sources] if path.suffix == ".cu" else [])) for path in units}
        objects = {
            folder / f"{path.stem}-{_digest(path.read_text(), *flags, *headers[path.suffix])}.o": path
            for path, flags in units.items()
        }
        library = folder / f"{namespace}-{_digest(*map(str, objects))}.so"
        launcher = ["ccache"] if shutil.which("ccache") else []
        jobs = [[*launcher, *units[u], "-x", "c++", "-c", u, "-o", o] for o, u in objects.items() if not o.exists()]
        if jobs or not library.exists():
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(_run, jobs))
            lib = Path(torch.__file__).parent / "lib"
            _run(["g++", "-shared", *objects, "-o", library, f"-L{lib}", "-ltorch_cpu", "-lc10"])
    return library


def _texts(*folders: Path) -> list[str]:
    return [path.read_text() for folder in folders for path in sorted(folder.rglob("*.h"))]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join((torch.__version__, *texts)).encode()).hexdigest()[:16]


def _run(command: list[str | Path]) -> None:
    """Runs a compiler. Its output, which follows -o, is there when it is whole, or not at all."""
    output = Path(command[command.index("-o") + 1])
    part = output.with_name(f"{output.name}.part")
    command = [part if argument == output else argument for argument in command]
    environment = os.environ | {"CCACHE_NOHASHDIR": "1", "CCACHE_BASEDIR": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}")
    part.replace(output)


class Emulator:
    """The loaded library: its ops, and the machine they run on."""

    def __init__(self, library: Path, namespace: str = NAMESPACE) -> None:
        schemas = torch.library.Library(namespace, "FRAGMENT")
        names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("megapre::")}
        for name in sorted(names):
            schemas.define(str(getattr(torch.ops.megapre, name).default._schema).removeprefix("megapre::"))
        torch.ops.load_library(str(library))
        self._schemas = schemas  # they live as long as this
        self._calls = ctypes.CDLL(str(library))
        self._calls.emulator_launches.restype = ctypes.c_int64
        self.ops = getattr(torch.ops, namespace)

    def schedule(self, seed: int) -> None:
        """The order in which warps and blocks run: drawn from `seed`, or by their numbers for 0."""
        self._calls.emulator_schedule(ctypes.c_uint64(seed))

    def device(self, multiprocessors: int = 3, capability: int = 90) -> None:
        """What the host code is told about the GPU; few multiprocessors make a persistent kernel loop."""
        self._calls.emulator_device(multiprocessors, capability)

    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._calls.emulator_launches())

    def guarded(self, t: Tensor) -> Tensor:
        """A contiguous copy with no memory behind its end; what is read or written there ends the launch."""
        return self.ops.guard(t.contiguous())

    def as_it_comes(self) -> None:
        """An sm_90 with three multiprocessors, warps in their order."""
        self.device()
        self.schedule(0)


@functools.cache
def loaded() -> Emulator:
    """The one of this process. Skips without what it needs: g++, x86-64 with FMA, the native library's schemas."""
    fuses = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if shutil.which("g++") is None or platform.machine() != "x86_64" or not fuses:
        pytest.skip("the emulator of CUDA needs g++ and an x86-64 processor with FMA")
    if not native.load():
        pytest.skip(native.status()[1])
    library.register()
    return Emulator(build())


def mutated(folder: Path, unit: str, source: str, before: str, after: str) -> Emulator:
    """The ops of `unit`.cu with `after` for the one `before` in a source; built in `folder`, whose name they take."""
    shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
    for path in folder.glob("*.cu"):
        if path.stem != unit:
            path.unlink()
    text = (folder / source).read_text()
    assert text.count(before) == 1, f"{source} has changed: what is the place to mutate now?"
    (folder / source).write_text(text.replace(before, after))
    namespace = f"mutated_{folder.name}"
    return Emulator(build(folder, namespace), namespace)
