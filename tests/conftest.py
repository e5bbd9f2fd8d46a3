"""One thread and one random stream for every test: a failure seen once is seen again. Real ranks, and large offsets."""

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from ranks import Pool, RunOn
from torch import Tensor

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


@pytest.fixture
def far(tmp_path: Path) -> Callable[[Tensor], Tensor]:
    """Copies tensors so that the last row starts more than 2^31 elements in. The file behind a copy is sparse."""

    def copy(t: Tensor) -> Tensor:
        inner = t[0].numel()
        stride = 2**31 // (len(t) - 1) + 2**20
        size = t.element_size() * ((len(t) - 1) * stride + inner)
        with (tmp_path / str(len(list(tmp_path.iterdir())))).open("w+b") as file:
            file.truncate(size)
            flat = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=t.dtype)
        return flat.as_strided(t.shape, (stride, *t[0].contiguous().stride())).copy_(t)

    return copy


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests with ranks go to one of xdist's workers (--dist loadgroup): one pool, and no more ranks than it has."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if "run_on" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group("ranks"))
