"""Fills Triton's cache with the kernels of real sizes, on all cores and without touching the GPU.

    python benchmarks/precompile.py                     for the GPU at hand
    python benchmarks/precompile.py --capability 90     for another one, on any machine

Triton compiles a kernel when it is first launched, one at a time, and most of a short check would be spent so. Here the
launch functions run on tensors without memory (the cases of .ci/aot_triton.py, and norms of the other widths that are
benchmarked), in one process a core; Triton's own
launcher binds the arguments for a device that is only named, compiles into its cache, and launches nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


WIDTHS = (768, 8192)


def cases() -> dict[str, Callable[[], None]]:
    """Calls of the launch functions by name."""
    spec = importlib.util.spec_from_file_location("aot_triton", ROOT / ".ci" / "aot_triton.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {**module.CASES, **{f"norm {width}": partial(module.norms, width) for width in WIDTHS}}


class NamedDevice:
    """A driver for Triton that knows which device to compile for, and has none."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(job: tuple[str, int]) -> tuple[str, int, str]:
    """(name, kernels compiled, what failed) of one case."""
    import triton
    from triton.runtime.jit import JITFunction

    name, capability = job
    triton.runtime.driver.set_active(NamedDevice(capability))
    launch, compiled = JITFunction.run, 0

    def compile_alone(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        nonlocal compiled
        launch(fn, *args, grid=grid, warmup=True, **kwargs)
        compiled += 1

    JITFunction.run = compile_alone
    try:
        cases()[name]()
    except Exception as error:  # what does not compile is for the tests to tell; the others still should
        return name, compiled, f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
    finally:
        JITFunction.run = launch
    return name, compiled, ""


def capability_here() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, help="as 90; default: that of the GPU at hand")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    capability = arguments.capability or capability_here()
    names = [name for name in cases() if arguments.cases in name]
    names.sort(key=lambda name: "attention" not in name)  # the longest first
    begin, total, failed = time.monotonic(), 0, 0
    with ProcessPoolExecutor(min(arguments.jobs, len(names))) as pool:
        for name, compiled, problem in pool.map(compile_case, [(name, capability) for name in names]):
            total, failed = total + compiled, failed + bool(problem)
            print(f"{name:28} {compiled:4d} launches compiled{'; ' + problem if problem else ''}", flush=True)
    print(f"{total} launches compiled for sm_{capability}, {failed} cases failed, {time.monotonic() - begin:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
