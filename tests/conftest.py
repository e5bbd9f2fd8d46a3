"""One thread and one random stream for every test: a failure seen once is seen again. And real ranks."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from ranks import Pool, RunOn

torch.set_num_threads(1)
os.environ["MEGAPRE_KERNEL_PROFILE"] = "off"  # what someone measured on this machine shall decide no test

# derandomize: the examples depend on the test alone. deadline None: a busy machine is not a failing one.
settings.register_profile(
    "deterministic", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# `HYPOTHESIS_PROFILE=explore pytest` looks for new examples instead.
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
# For code that other runs of the same test prove with all examples: another code path, or a sanitizer.
settings.register_profile("few", settings.get_profile("deterministic"), max_examples=12)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))


@pytest.fixture(scope="session")
def _pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool


@pytest.fixture
def run_on(_pool: Pool) -> RunOn:
    """Runs a function on real ranks: see ranks.py."""
    return _pool.run_on


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests with ranks go to one of xdist's workers (--dist loadgroup): one pool, and no more ranks than it has."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if "run_on" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group("ranks"))
