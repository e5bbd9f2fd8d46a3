"""Every code path that this CPU can run passes the native tests, not only the best one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megapre.kernels import native

LEVELS = ("default", "avx2", "avx512")
THIS_FOLDER = Path(__file__).parent


def cpu_runs(level: str) -> bool:
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
    return LEVELS.index(level) <= LEVELS.index(best)


def python(*arguments: str, level: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MEGAPRE_CPU_LEVEL": level, "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "few"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("level", LEVELS)
def test_forced_level(ops: Any, level: str) -> None:
    if not cpu_runs(level):
        pytest.skip(f"this CPU has no {level}")
    if level == native.cpu_level():
        return  # the rest of this run tests it
    ways_of_loading = {f"test_native_{what}.py" for what in ("levels", "loading")}
    found = [*THIS_FOLDER.glob("test_native_*.py"), *THIS_FOLDER.with_name("forms").glob("test_*_forms.py")]
    files = [str(file) for file in sorted(found) if file.name not in ways_of_loading]
    options = ("-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = python("-m", "pytest", *options, *files, level=level)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_level_is_the_forced_one(ops: Any) -> None:
    done = python("-c", "from megapre.kernels import native; print(native.cpu_level())", level="default")
    assert done.stdout.strip() == "default", done.stderr


def test_a_level_that_is_none_is_an_error(ops: Any) -> None:
    done = python("-c", "from megapre.kernels import native; native.load()", level="sse9")
    assert done.returncode == 1
    assert "MEGAPRE_CPU_LEVEL=sse9 names no level; levels are default, avx2 and avx512" in done.stderr


def test_an_impossible_level_is_an_error(ops: Any) -> None:
    if cpu_runs("avx512"):
        pytest.skip("this CPU runs every level")
    done = python("-c", "from megapre.kernels import native; native.load()", level="avx512")
    assert done.returncode == 1
    assert "MEGAPRE_CPU_LEVEL=avx512: this CPU cannot run it" in done.stderr
