"""Whether the native library is used, and what is said when it is not."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megapre.kernels import native

ROOT = Path(__file__).parents[2]


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nothing had been loaded yet; what these tests learn is forgotten afterwards."""
    monkeypatch.delenv("MEGAPRE_NATIVE", raising=False)
    native._attempt.cache_clear()
    yield
    native._attempt.cache_clear()


def test_loading_twice_is_loading_once(ops: Any) -> None:
    assert native.load() and native.load()
    assert native.status() == (True, "")


def test_records_the_torch_it_was_built_for(ops: Any) -> None:
    assert native.built_for(native.LIBRARY) == torch.__version__.split("+")[0]


def test_a_library_for_another_torch_is_refused(
    ops: Any, untried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = torch.__version__.split("+")[0].encode()
    other = version[:-1] + b"?"
    library = tmp_path / "libmegapre_ops.so"
    mark = b"megapre-built-for-torch="
    library.write_bytes(native.LIBRARY.read_bytes().replace(mark + version, mark + other))
    monkeypatch.setattr(native, "LIBRARY", library)
    loaded, why_not = native.status()
    assert not loaded
    assert f"was built for torch {other.decode()} and this is torch {version.decode()}; build it again" in why_not


def test_a_missing_library_is_a_reason_or_an_error(
    untried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    assert not native.load()
    assert "does not exist; build it with: pip install --no-build-isolation -e ." in native.status()[1]
    assert native.cpu_level() == ""
    monkeypatch.setenv("MEGAPRE_NATIVE", "1")
    with pytest.raises(native.NativeError, match=r"MEGAPRE_NATIVE=1, but .* does not exist"):
        native.load()


def test_the_list_of_ops_is_that_of_the_sources() -> None:
    source = (ROOT / "csrc" / "ops.cpp").read_text()
    assert list(native.OPS) == re.findall(r'm\.def\(\s*"(\w+)\(', source)


def test_each_op_that_a_library_lacks_is_seen(ops: Any, tmp_path: Path) -> None:
    content, library = native.LIBRARY.read_bytes(), tmp_path / "libmegapre_ops.so"
    for op in native.OPS:
        library.write_bytes(content.replace(f"{op}(".encode(), f"{op[:-1]}?(".encode()))
        assert native.lacking(library) == [op]


STALE = """
import sys
from pathlib import Path
from megapre.kernels import native
native.LIBRARY = Path(sys.argv[1])
from megapre import kernels
from megapre.observe import doctor
print({row.why_not for row in kernels.table("cpu") if row.implementation == "native"})
print(dict(doctor.facts(doctor.native)))
"""


def test_a_library_of_older_sources_is_the_reason_of_every_row(ops: Any, tmp_path: Path) -> None:
    """Nothing of it is loaded, and `megapre doctor` says the same."""
    library = tmp_path / "libmegapre_ops.so"
    library.write_bytes(native.LIBRARY.read_bytes().replace(b"has_products_of(", b"has_products_if("))
    environment = {**os.environ, "MEGAPRE_NATIVE": "auto", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STALE, str(library)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reason = (
        f"{library} was built from older sources: rebuild it with make setup "
        "(or pip install --no-build-isolation -e .); it has no has_products_of"
    )
    rows, facts = map(ast.literal_eval, done.stdout.splitlines())
    assert rows == {reason}
    assert facts["native ops"] == f"not used, plain torch instead: {reason}" and "failed" not in facts


WHOLE = b"megapre-built-for-torch=%s;" + "".join(f"{op}(" for op in native.OPS).encode()


@pytest.mark.parametrize("content", [b"", b"not a library", b"megapre-built-for-torch=%s;", WHOLE])
def test_a_broken_library_is_a_reason(
    untried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    library = tmp_path / "libmegapre_ops.so"
    library.write_bytes(content.replace(b"%s", torch.__version__.split("+")[0].encode()))
    monkeypatch.setattr(native, "LIBRARY", library)
    loaded, why_not = native.status()
    assert not loaded and str(library) in why_not


def test_it_can_be_turned_off(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAPRE_NATIVE", "0")
    assert native.status() == (False, "MEGAPRE_NATIVE=0 turns it off")
    assert not native.load()


def test_cuda_kernels_say_why_they_are_not_there(
    untried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a torch without CUDA they are not looked for; under one with it, the file is missing or broken."""
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "cuda.so")

    def said() -> str:
        native._attempt_cuda.cache_clear()
        loaded, why_not = native.cuda_status()
        assert not loaded
        return why_not

    monkeypatch.setattr(torch.version, "cuda", None)
    assert said() == f"torch {torch.__version__} is built for the CPU alone"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cuda.so does not exist; build it with: MEGAPRE_CUDA=1 pip install" in said()
    native.CUDA_LIBRARY.write_bytes(b"not a library")
    assert "cuda.so cannot be loaded" in said()
    monkeypatch.setenv("MEGAPRE_NATIVE", "0")
    assert said() == "MEGAPRE_NATIVE=0 turns it off"
    native._attempt_cuda.cache_clear()


def test_an_unknown_mode_is_an_error(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAPRE_NATIVE", "yes")
    with pytest.raises(native.NativeError, match="MEGAPRE_NATIVE=yes: must be auto, 0 or 1"):
        native.load()
