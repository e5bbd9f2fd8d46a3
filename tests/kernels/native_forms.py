"""The native forms of our ops as tests take them: C++ for the CPU, and CUDA under emulation.

MEGAPRE_TEST_LIBRARY names another build of the CPU's library to test, such as the one with sanitizers; MEGAPRE_NATIVE=1
makes its absence an error, not a skip.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from megapre.kernels import library, native


@dataclass(frozen=True)
class Form:
    """`ops` takes CPU tensors in either form; `guarded` copies one, with no memory behind its end where that can be.

    `device` is of the emulator: what the CUDA form is told of its GPU.
    """

    name: str
    ops: Any
    guarded: Callable[[Tensor], Tensor]
    device: Callable[..., None]


def cpu_ops() -> Any:
    """torch.ops.megapre with the C++ kernels behind it; skips where there is no library."""
    if other := os.environ.get("MEGAPRE_TEST_LIBRARY"):
        native.LIBRARY = Path(other)
    if not native.load():
        pytest.skip(native.status()[1])
    library.register()
    return torch.ops.megapre


def form(name: str) -> Form:
    """`name` is cpu or cuda; the latter as an sm_90 with three multiprocessors, whose warps run in their order."""
    if name == "cpu":
        return Form(name, cpu_ops(), lambda t: t.clone(memory_format=torch.contiguous_format), lambda **_: None)
    emulator = emulated.loaded()
    emulator.as_it_comes()
    return Form(name, emulator.ops, emulator.guarded, emulator.device)
