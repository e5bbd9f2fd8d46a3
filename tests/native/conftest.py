"""Fixtures of the native op tests. MEGAPRE_CPU_LEVEL chooses the code path; test_native_levels.py runs all of them.

MEGAPRE_TEST_LIBRARY names another build of the library to test, such as the one with sanitizers.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megapre.kernels import library, native


@pytest.fixture(scope="session")
def ops() -> object:
    """torch.ops.megapre with the C++ kernels behind it. MEGAPRE_NATIVE=1 makes their absence an error, not a skip."""
    if other := os.environ.get("MEGAPRE_TEST_LIBRARY"):
        native.LIBRARY = Path(other)
    if not native.load():
        pytest.skip(native.status()[1])
    library.register()
    return torch.ops.megapre


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN instead of what happened to be there: a kernel that leaves an output unwritten fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads for one test; the others run on one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
