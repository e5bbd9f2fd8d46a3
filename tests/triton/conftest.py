"""The Triton kernels against their references: on a GPU as they are, elsewhere in Triton's interpreter.

Triton decides when it is imported whether it interprets, so without a GPU the tests run in a process of their own,
started with TRITON_INTERPRET=1 by test_interpreter.py; in any other process on such a machine they are not collected.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, compute_as_the_hardware

if INTERPRETED:
    compute_as_the_hardware()
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_triton_*.py"]


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
