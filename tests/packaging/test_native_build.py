"""How setup.py behaves when it cannot build, and what the compiler left in the object files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the build files with an empty package."""
    for name in ("pyproject.toml", "README.md", "setup.py", "CMakeLists.txt", "megapre/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def build(tree: Path, mode: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "MEGAPRE_NATIVE": mode, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("mode", "status"), [("auto", 0), ("1", 1)])
def test_no_compiler(tree: Path, mode: str, status: int) -> None:
    done = build(tree, mode, CXX="/nonexistent/c++")
    assert done.returncode == status, done.stderr
    assert "the build failed" in done.stderr
    if mode == "1":
        assert "MEGAPRE_NATIVE=1, but native code cannot be built" in done.stderr
    else:
        assert "native code left out" in done.stderr
    assert not list(tree.rglob("*.so"))


def test_turned_off(tree: Path) -> None:
    done = build(tree, "0", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert not (tree / "build").exists()


def test_an_unknown_mode_is_an_error(tree: Path) -> None:
    done = build(tree, "yes")
    assert done.returncode == 1
    assert "MEGAPRE_NATIVE=yes: must be auto, 0 or 1" in done.stderr


@pytest.mark.parametrize(("mode", "status"), [("auto", 0), ("1", 1)])
def test_no_cuda_compiler(tree: Path, mode: str, status: int) -> None:
    """CUDA kernels are asked for and left out on their own: what the CPU's compiler does is not their business."""
    where = {"PATH": "/nonexistent", "CUDA_HOME": "/nonexistent", "CXX": "/nonexistent/c++"}
    done = build(tree, "auto", MEGAPRE_CUDA=mode, **where)
    assert done.returncode == status, done.stderr
    if mode == "1":
        assert "MEGAPRE_CUDA=1, but CUDA kernels cannot be built: nvcc not found" in done.stderr
    else:
        assert "CUDA kernels left out: nvcc not found (CUDA_HOME names the toolkit's folder)" in done.stderr


def test_no_level_shares_an_inline_function_with_another() -> None:
    """The linker keeps one copy of a weak symbol: one from an AVX-512 object would crash an older CPU.

    Whatever a file of row loops leaves weak must carry the name of its level, for then only that level calls it.
    """
    objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/rows_*.dir/**/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files, or no nm, on this machine")
    for path in objects:
        level = re.search(r"rows_(\w+)\.dir", str(path))[1]  # type: ignore[index]
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        shared = [line for line in symbols.splitlines() if line[17:18] in "WVu" and f"::{level}::" not in line]
        assert not shared, f"{path.name} at level {level}: {shared}"
