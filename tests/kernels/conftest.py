"""Fixtures of the kernel tests: every implementation of the registry on every device that is there.

A test that takes `device` and `implementation` runs once for each implementation that can run, of the op its module
names in OP or its marker names: `@pytest.mark.op("geglu")`. Those that refuse some of the op's calls have tests of
their own: test_partial_rows.py.
"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, compute_as_the_hardware
from rule import poisoned

from megapre import kernels
from megapre.kernels.third_party import found

if INTERPRETED:
    compute_as_the_hardware()


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
    with poisoned():
        yield


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts functions under a module's name, and empty packages above it."""

    def put(name: str, **functions: Any) -> None:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        for key, function in functions.items():
            monkeypatch.setattr(sys.modules[name], key, function, raising=False)

    return put


@pytest.fixture
def nothing_real() -> Iterator[None]:
    """A library that is installed keeps its place: these tests are for machines without it."""
    real = [name for name in ("liger_kernel", "transformer_engine", "amp_C", "flash_attn") if found.there(name)]
    if real and any(getattr(sys.modules.get(name), "__file__", None) for name in real):
        pytest.skip(f"{real} are imported here")
    yield
