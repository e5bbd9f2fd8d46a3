"""The optional C++ module, or None: every caller has a NumPy form with the same result."""

import os
from functools import lru_cache
from importlib import import_module
from types import ModuleType


@lru_cache(maxsize=1)
def host() -> ModuleType | None:
    """`megapre._host`, None where it was not built or MEGAPRE_NATIVE=0. With MEGAPRE_NATIVE=1 a missing one raises."""
    wanted = os.environ.get("MEGAPRE_NATIVE", "auto")
    if wanted == "0":
        return None
    try:
        return import_module("megapre._host")
    except ImportError:
        if wanted == "1":
            raise
        return None
