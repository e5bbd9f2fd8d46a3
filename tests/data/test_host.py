"""Which setting of MEGAPRE_NATIVE asks for what."""

import sys

import pytest

from megapre.data import DataError
from megapre.data.host import host


@pytest.mark.parametrize(("value", "told"), [("1", "build it or unset MEGAPRE_NATIVE"), ("yes", "MEGAPRE_NATIVE=yes")])
def test_what_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch, value: str, told: str) -> None:
    monkeypatch.setitem(sys.modules, "megapre._host", None)
    monkeypatch.setenv("MEGAPRE_NATIVE", value)
    host.cache_clear()
    with pytest.raises(DataError, match=told):
        host()
    host.cache_clear()
