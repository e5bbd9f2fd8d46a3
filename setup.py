"""Builds the native code through CMake and Ninja; everything declarative is in pyproject.toml.

MEGAPRE_NATIVE=auto (default): build what this machine can build, and say what was left out and why.
MEGAPRE_NATIVE=0: build nothing; a pure-Python wheel. MEGAPRE_NATIVE=1: whatever cannot be built is an error.

MEGAPRE_CUDA=auto (default): build the CUDA kernels where nvcc is and torch is a CUDA build. MEGAPRE_CUDA=0: leave them
out. MEGAPRE_CUDA=1: build them for whatever torch there is (they serve any from 2.11 on); where they cannot be built,
that is an error.
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
CUDA = "megapre/kernels/_native/libmegapre_cuda.so"
HOST = "megapre/_host" + sysconfig.get_config_var("EXT_SUFFIX")


def mode(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}={value}: must be auto, 0 or 1")
    return value


def tool(name: str) -> str | None:
    """A program of the environment that builds, else of the machine."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def torch_arguments() -> dict[str, str]:
    """CMake variables for the torch that is importable here; empty if there is none."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from torch.utils.cpp_extension import include_paths

    return {
        "TORCH_INCLUDE": ";".join(include_paths()),
        "TORCH_LIB": str(Path(torch.__file__).parent / "lib"),
        "TORCH_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
        "TORCH_VERSION": torch.__version__.split("+")[0],
    }


def nvcc() -> str | None:
    """CUDA's compiler: that of CUDA_HOME, else of the machine."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def why_no_cuda(has_torch: bool) -> str:
    """Why the CUDA kernels are not built; empty when they are."""
    if mode("MEGAPRE_CUDA") == "0":
        return "MEGAPRE_CUDA=0"
    if not has_torch:
        return "torch is not importable"
    if nvcc() is None:
        return "nvcc not found (CUDA_HOME names the toolkit's folder)"
    import torch

    if torch.version.cuda is None and mode("MEGAPRE_CUDA") == "auto":
        return f"torch {torch.__version__} is built for the CPU alone (MEGAPRE_CUDA=1 builds them all the same)"
    return ""


def host_arguments(torch_include: str) -> dict[str, str]:
    """CMake variables for the host module; empty without pybind11 (its package, or the copy among torch's headers)."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        headers = pybind11.get_include()
    else:
        headers = next((path for path in torch_include.split(";") if (Path(path) / "pybind11").is_dir()), "")
    if not headers:
        return {}
    return {
        "PYBIND11_INCLUDE": headers,
        "PYTHON_INCLUDE": sysconfig.get_path("include"),
        "PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }


class NativeBuild(build_ext):
    """Runs CMake once and copies both libraries beside the Python files, in the source tree or in the wheel."""

    def run(self) -> None:
        if mode("MEGAPRE_NATIVE") == "0":
            return
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
        tensor_ops = torch_arguments()
        host = host_arguments(tensor_ops.get("TORCH_INCLUDE", ""))
        if not tensor_ops:
            self.leave_out("tensor ops", "torch is not importable; install it first and use --no-build-isolation")
        if not host:
            self.leave_out("host module", "pybind11 is not importable")
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        # Every variable is passed every time, so that none survives in CMake's cache from another environment.
        variables = dict.fromkeys(
            ("TORCH_INCLUDE", "TORCH_LIB", "TORCH_VERSION", "NVCC", "PYBIND11_INCLUDE", "PYTHON_INCLUDE"), ""
        )
        no_cuda = why_no_cuda(bool(tensor_ops))
        if no_cuda:
            self.leave_out("CUDA kernels", no_cuda, required=mode("MEGAPRE_CUDA") == "1")
        else:
            variables["NVCC"] = str(nvcc())
        variables |= {"CMAKE_MAKE_PROGRAM": str(tool("ninja"))} | tensor_ops | host
        definitions = [f"-D{name}={value}" for name, value in variables.items()]
        cmake = str(tool("cmake"))
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *definitions], check=True, stdout=sys.stderr)
        subprocess.run([cmake, "--build", build], check=True, stdout=sys.stderr)
        built = {OPS: build / "libmegapre_ops.so"} if tensor_ops else {}
        if built:  # a compiler with another OpenMP, say, links what torch cannot load
            load = "import sys, torch; torch.ops.load_library(sys.argv[1])"
            subprocess.run([sys.executable, "-c", load, str(built[OPS])], check=True)
        if not no_cuda:
            built[CUDA] = build / "libmegapre_cuda.so"
        return built | ({HOST: build / Path(HOST).name} if host else {})

    def leave_out(self, what: str, why: str, required: bool | None = None) -> None:
        """Says so, or ends the build where the environment requires it: MEGAPRE_NATIVE=1, or as `required` says."""
        if mode("MEGAPRE_NATIVE") == "1" if required is None else required:
            variable = "MEGAPRE_NATIVE" if required is None else "MEGAPRE_CUDA"
            raise SystemExit(f"{variable}=1, but {what} cannot be built: {why}")
        self.warn(f"{what} left out: {why}. Everything works without, more slowly (MEGAPRE_NATIVE=0 skips the attempt)")

    def get_outputs(self) -> list[str]:
        return [
            str(Path(self.build_lib) / name) for name in (OPS, CUDA, HOST) if (Path(self.build_lib) / name).exists()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # One placeholder: it makes the wheel a platform wheel and calls the command above.
    ext_modules=[] if mode("MEGAPRE_NATIVE") == "0" else [Extension("megapre._native_build", sources=[])],
    cmdclass={"build_ext": NativeBuild},
)
