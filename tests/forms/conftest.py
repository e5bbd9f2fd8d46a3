"""One set of tests for both native forms of an op: C++ for the CPU, and CUDA, here under emulation.

A test that takes `form` runs once for each; one that takes `dtype` too, for each dtype its module names for that form:
`DTYPES = {"cpu": [...], "cuda": [...]}`. What only one form has or says is tested in tests/native and tests/cuda.
Where MEGAPRE_CPU_LEVEL or MEGAPRE_TEST_LIBRARY chooses what of the CPU's to test, the CUDA form is left out.
"""

import os
from collections.abc import Iterator

import native_forms
import pytest
from rule import poisoned


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "form" not in metafunc.fixturenames:
        return
    chosen = os.environ.keys() & {"MEGAPRE_CPU_LEVEL", "MEGAPRE_TEST_LIBRARY"}
    names = ["cpu"] if chosen else ["cpu", "cuda"]
    if "dtype" not in metafunc.fixturenames:
        metafunc.parametrize("form", names, indirect=True, scope="session")
        return
    rows = [(name, dtype) for name in names for dtype in metafunc.module.DTYPES[name]]
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in rows]
    metafunc.parametrize(("form", "dtype"), rows, indirect=["form"], scope="session", ids=ids)


@pytest.fixture(scope="session")
def form(request: pytest.FixtureRequest) -> native_forms.Form:
    return native_forms.form(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory(form: native_forms.Form) -> Iterator[None]:
    native_forms.form(form.name)  # the emulator as it comes, whatever another test has made of it
    with poisoned():
        yield
