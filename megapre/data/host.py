"""The optional C++ module, or None: every caller has a NumPy form with the same result."""

import os
from functools import lru_cache
from importlib import import_module
from types import ModuleType

from .errors import DataError


@lru_cache(maxsize=1)
def host() -> ModuleType | None:
    """`megapre._host`, None where it was not built or MEGAPRE_NATIVE=0.

    Raises DataError where MEGAPRE_NATIVE=1 and there is none, and for a value that is not auto, 0 or 1.
    """
    wanted = os.environ.get("MEGAPRE_NATIVE", "auto")
    if wanted not in ("auto", "0", "1"):
        raise DataError(f"MEGAPRE_NATIVE={wanted}; there are auto, 0 (never) and 1 (always)")
    if wanted == "0":
        return None
    try:
        return import_module("megapre._host")
    except ImportError as error:
        if wanted == "1":
            raise DataError(
                f"MEGAPRE_NATIVE=1, but megapre._host is not there ({error}): build it or unset MEGAPRE_NATIVE"
            ) from error
        return None
