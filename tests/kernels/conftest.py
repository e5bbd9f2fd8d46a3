"""Fixtures of the kernel tests: every implementation of the registry on every device that is there.

A test that takes `device` and `implementation` runs once for each implementation that can run, of the op its module
names in OP or its marker names: `@pytest.mark.op("geglu")`. Those that refuse some of the op's calls have tests of
their own: test_partial_rows.py.
"""

from collections.abc import Iterator

import pytest
import torch

from megapre import kernels


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "op(name): the op whose implementations a kernel test runs over")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" not in metafunc.fixturenames:
        return
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    mark = {"cpu": (), "cuda": (pytest.mark.gpu,)}
    if "implementation" not in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(device, marks=mark[device]) for device in devices])
        return
    marker = metafunc.definition.get_closest_marker("op")
    op = marker.args[0] if marker else metafunc.module.OP
    rows = [
        (device, row)
        for device in devices
        for row in kernels.table(device)
        if row.op == op and row.available and not row.takes
    ]
    metafunc.parametrize(
        ("device", "implementation"),
        [pytest.param(device, row.implementation, marks=mark[device]) for device, row in rows],
    )


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN instead of what happened to be there: a kernel that leaves an output unwritten fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
