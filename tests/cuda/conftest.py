"""The emulated CUDA ops, built once and loaded once a session."""

from collections.abc import Iterator

import emulated
import pytest


@pytest.fixture(scope="session")
def loaded_emulator() -> emulated.Emulator:
    return emulated.loaded()


@pytest.fixture
def emulator(loaded_emulator: emulated.Emulator) -> Iterator[emulated.Emulator]:
    loaded_emulator.as_it_comes()
    yield loaded_emulator
    loaded_emulator.as_it_comes()
