"""Builds the native code through CMake and Ninja; everything declarative is in pyproject.toml.

MEGAPRE_NATIVE=auto (default): build what this machine can build, and say what was left out and why.
MEGAPRE_NATIVE=0: build nothing; a pure-Python wheel. MEGAPRE_NATIVE=1: whatever cannot be built is an error.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS = "megapre/kernels/_native/libmegapre_ops.so"
HOST = "megapre/_host" + sysconfig.get_config_var("EXT_SUFFIX")


def native_mode() -> str:
    mode = os.environ.get("MEGAPRE_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"MEGAPRE_NATIVE={mode}: must be auto, 0 or 1")
    return mode


def tool(name: str) -> str | None:
    """A program of the environment that builds, else of the machine."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def torch_arguments() -> list[str]:
    """CMake arguments for the torch that is importable here; none if there is no torch."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch
    from torch.utils.cpp_extension import include_paths

    lib = Path(torch.__file__).parent / "lib"
    return [
        "-DTORCH_INCLUDE=" + ";".join(include_paths()),
        f"-DTORCH_LIB={lib}",
        f"-DTORCH_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]


def host_arguments() -> list[str]:
    if importlib.util.find_spec("pybind11") is None:
        return []
    import pybind11

    return [
        f"-DPYBIND11_INCLUDE={pybind11.get_include()}",
        f"-DPYTHON_INCLUDE={sysconfig.get_path('include')}",
        f"-DPYTHON_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
    ]


class NativeBuild(build_ext):
    """Runs CMake once and copies both libraries beside the Python files, in the source tree or in the wheel."""

    def run(self) -> None:
        try:
            built = self.compile()
        except (OSError, subprocess.CalledProcessError) as error:
            self.leave_out("native code", f"the build failed: {error}")
            built = {}
        for name, library in built.items():
            target = Path(name) if self.inplace else Path(self.build_lib) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # A process may have the old file mapped: put the new one in its place by a rename, never write into it.
            shutil.copy2(library, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)

    def compile(self) -> dict[str, Path]:
        missing = [name for name in ("cmake", "ninja") if tool(name) is None]
        if missing:
            self.leave_out("native code", f"{' and '.join(missing)} not found")
            return {}
        torch_args, host_args = torch_arguments(), host_arguments()
        if not torch_args:
            self.leave_out("tensor ops", "torch is not importable; install it first and use --no-build-isolation")
        if not host_args:
            self.leave_out("host module", "pybind11 is not importable")
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        # --fresh: folders in the cache of an earlier build may be gone. Ninja still rebuilds only what changed.
        configure = ["cmake", "--fresh", "-S", ROOT, "-B", build, *generator, *torch_args, *host_args]
        subprocess.run([tool("cmake"), *map(str, configure[1:])], check=True, stdout=sys.stderr)
        subprocess.run([tool("cmake"), "--build", str(build)], check=True, stdout=sys.stderr)
        outputs = {OPS: build / "libmegapre_ops.so", HOST: build / Path(HOST).name}
        return {name: library for name, library in outputs.items() if library.exists()}

    def leave_out(self, what: str, why: str) -> None:
        if native_mode() == "1":
            raise SystemExit(f"MEGAPRE_NATIVE=1, but {what} cannot be built: {why}")
        self.warn(f"{what} left out: {why}. Everything works without, more slowly (MEGAPRE_NATIVE=0 skips the attempt)")

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / name) for name in (OPS, HOST) if (Path(self.build_lib) / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # One placeholder: it makes the wheel a platform wheel and calls the command above.
    ext_modules=[] if native_mode() == "0" else [Extension("megapre._native_build", sources=[])],
    cmdclass={"build_ext": NativeBuild},
)
