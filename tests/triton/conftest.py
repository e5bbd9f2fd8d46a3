"""The Triton kernels against their references: on a GPU as they are, elsewhere in Triton's interpreter.

Triton decides when it is imported whether it interprets, so without a GPU the tests run in a process of their own,
started with TRITON_INTERPRET=1 by test_interpreter.py; in any other process on such a machine they are not collected.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))  # rule.py

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_triton_*.py"]


def _compute_as_the_hardware() -> None:
    """The interpreter truncates fp32 to bf16 and multiplies the bits of bf16 matrices as integers.

    A GPU rounds to nearest even and multiplies what the bits mean; so does this.
    """
    import numpy as np
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) == ("bf16", "fp32"):
            return data.astype(np.uint32) << 16
        if (source.name, target.name) != ("fp32", "bf16"):
            return original(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        tl = interpreter.tl
        wide = [
            interpreter.TensorHandle(convert(t.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
            if t.dtype.scalar == tl.bfloat16
            else t
            for t in (a, b)
        ]
        return dot(self, *wide, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    _compute_as_the_hardware()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU they are tests of it, for whoever selects these by mark (benchmarks/gpu_tests.py)."""
    for item in items:
        here = Path(__file__).parent in item.path.parents
        if here and not INTERPRETED and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    from rule import poisoned

    from megapre.kernels import library
    from megapre.kernels.triton import ops

    library.register()
    ops.register()
    with poisoned():
        yield
