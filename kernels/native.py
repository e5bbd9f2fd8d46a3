"""The native op libraries, of the CPU and of CUDA: loaded once, on first use, or not at all and with a reason.

MEGAPRE_NATIVE=auto (default) uses it when it is there, 0 leaves it alone, 1 makes its absence an error.
MEGAPRE_CPU_LEVEL=default|avx2|avx512 forces a code path; the best one that the CPU can run is taken otherwise.
"""

import functools
import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_native" / "libmegapre_ops.so"
CUDA_LIBRARY = LIBRARY.with_name("libmegapre_cuda.so")
_VERSION_MARK = b"megapre-built-for-torch="  # csrc/ops.cpp
OPS = (
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "gelu",
    "gelu_backward",
    "swiglu",
    "swiglu_backward",
    "geglu",
    "geglu_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_",
    "cross_entropy_local",
    "cross_entropy_local_backward_",
    "attention",
    "attention_backward_",
    "linear_",
    "linear_input_gradient_",
    "linear_weight_gradient_",
    "embedding",
    "embedding_gradient_",
    "has_products_of",
    "rope",
    "rope_",
    "rope_qkv_backward",
    "adamw_",
    "adamw_stochastic_",
    "grad_norm",
    "cpu_level",
)
"""What csrc/ops.cpp defines: a library without one of them was built from older sources, whose other ops may take other
arguments."""


class NativeError(ValueError):
    """The environment asks for what cannot be had: MEGAPRE_NATIVE=1 without a library, a CPU level that is none."""


def load() -> bool:
    """Loads the library if it has not been tried yet. Whether its ops are registered.

    NativeError when MEGAPRE_NATIVE=1 and it cannot be loaded.
    """
    why_not = _attempt()
    if why_not and os.environ.get("MEGAPRE_NATIVE") == "1":
        raise NativeError(f"MEGAPRE_NATIVE=1, but the native ops cannot be used: {why_not}")
    return not why_not


def status() -> tuple[bool, str]:
    """(whether the library is loaded, why not); tries to load it first."""
    why_not = _attempt()
    return not why_not, why_not


def cuda_status() -> tuple[bool, str]:
    """As `status`, of the CUDA kernels. Loading them does not initialise CUDA."""
    why_not = _attempt_cuda()
    return not why_not, why_not


def cpu_level() -> str:
    """The code path of the native ops: "default", "avx2" or "avx512"; "" when they are not loaded."""
    return str(torch.ops.megapre.cpu_level()) if load() else ""


def built_for(library: Path) -> str:
    """The torch version that `library` was compiled against, read from its bytes; "" when it holds no such mark."""
    content = library.read_bytes()
    mark = content.find(_VERSION_MARK)
    return "" if mark < 0 else content[mark + len(_VERSION_MARK) :].split(b";", 1)[0].decode(errors="replace")


def lacking(library: Path) -> list[str]:
    """Those of OPS whose schema is not among the bytes of `library`."""
    content = library.read_bytes()
    return [op for op in OPS if f"{op}(".encode() not in content]


@functools.cache
def _attempt() -> str:
    """Why the library cannot be used; empty when it was loaded."""
    mode = os.environ.get("MEGAPRE_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise NativeError(f"MEGAPRE_NATIVE={mode}: must be auto, 0 or 1")
    if mode == "0":
        return "MEGAPRE_NATIVE=0 turns it off"
    if not LIBRARY.exists():
        return f"{LIBRARY} does not exist; build it with: pip install --no-build-isolation -e . (needs a C++ compiler)"
    # Everything before "+" (as in 2.13.0+cpu) is what decides the binary interface of libtorch_cpu.
    here, there = torch.__version__.split("+")[0], built_for(LIBRARY)
    if here != there:
        return f"{LIBRARY} was built for torch {there or '(unknown)'} and this is torch {here}; build it again"
    if missing := lacking(LIBRARY):  # before it is loaded: that could not be undone
        build = "make setup (or pip install --no-build-isolation -e .)"
        return f"{LIBRARY} was built from older sources: rebuild it with {build}; it has no {', '.join(missing)}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY} cannot be loaded: {error}"
    try:
        torch.ops.megapre.cpu_level()
    except ValueError as error:
        raise NativeError(str(error)) from None
    return ""


@functools.cache
def _attempt_cuda() -> str:
    """Why the CUDA kernels cannot be used; empty when they were loaded. They serve every torch from 2.11 on."""
    if os.environ.get("MEGAPRE_NATIVE") == "0":
        return "MEGAPRE_NATIVE=0 turns it off"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for the CPU alone"
    if not CUDA_LIBRARY.exists():
        build = "MEGAPRE_CUDA=1 pip install --no-build-isolation -e . (needs nvcc)"
        return f"{CUDA_LIBRARY} does not exist; build it with: {build}"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{CUDA_LIBRARY} cannot be loaded: {error}"
    return ""
