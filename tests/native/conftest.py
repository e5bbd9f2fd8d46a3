"""Fixtures of the native op tests. MEGAPRE_CPU_LEVEL chooses the code path; test_native_levels.py runs all of them."""

from collections.abc import Iterator

import native_forms
import pytest
import torch
from rule import poisoned


@pytest.fixture(scope="session")
def ops() -> object:
    return native_forms.cpu_ops()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads for one test; the others run on one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
