"""The emulated CUDA ops, built once and loaded once a session."""

import platform
import shutil
from collections.abc import Iterator

import emulated
import pytest

from megapre.kernels import library, native


@pytest.fixture(scope="session")
def loaded_emulator() -> emulated.Emulator:
    """Skips where the emulator cannot be: it needs g++ on x86-64 and the schemas of the native library."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the emulator of CUDA needs g++ and an x86-64 processor")
    if not native.load():
        pytest.skip(native.status()[1])
    library.register()
    return emulated.Emulator(emulated.build())


@pytest.fixture
def emulator(loaded_emulator: emulated.Emulator) -> Iterator[emulated.Emulator]:
    """As it comes: an sm_90 with three multiprocessors, warps in their order."""
    loaded_emulator.device()
    loaded_emulator.schedule(0)
    yield loaded_emulator
    loaded_emulator.device()
    loaded_emulator.schedule(0)
