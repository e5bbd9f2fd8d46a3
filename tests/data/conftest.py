"""Index builders are tested in both forms: C++ where it is built, and NumPy."""

from collections.abc import Iterator

import pytest

from megapre.data.host import host


@pytest.fixture(params=[True, False], ids=["native", "numpy"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Runs a test with megapre._host and without it; the first form is skipped where it was not built."""
    if request.param and host() is None:
        pytest.skip("megapre._host is not built")
    monkeypatch.setenv("MEGAPRE_NATIVE", "auto" if request.param else "0")
    host.cache_clear()
    yield request.param
    monkeypatch.undo()
    host.cache_clear()
