"""What was measured on a machine decides there, where it is clear, and nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megapre import kernels
from megapre.kernels import profile

SHAPE = "T=2048,H=768"
SLOW, FAST, LEVEL, NOISY = (2.0, 2.1, 2.2), (1.0, 1.1, 1.2), (1.99, 2.0, 2.3), (1.0, 1.5, 2.5)
OP, PREFERRED, OTHER = "swiglu", "native", "torch"


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "kernel-profile.json"
    monkeypatch.setenv("MEGAPRE_KERNEL_PROFILE", str(path))
    return path


@pytest.fixture
def preferred(file: Path) -> str:
    """The implementation of swiglu that is first here."""
    return kernels.choose("cpu").names[OP]


def ops(preferred: Any, other: Any, first: str, dtype: str = "bf16") -> dict[str, Any]:
    return {OP: {dtype: {SHAPE: {first: preferred, OTHER: other}}}}


def test_a_clear_winner_is_used_and_says_so(file: Path, preferred: str) -> None:
    assert profile.write("cpu", ops(SLOW, FAST, preferred)) == file
    chosen = kernels.choose("cpu")
    assert (chosen.names[OP], chosen.origins[OP]) == (OTHER, "profile")
    assert {origin for op, origin in chosen.origins.items() if op != OP} == {"preference"}
    rows = {row.implementation: row for row in kernels.table("cpu") if row.op == OP}
    assert rows[OTHER].chosen and rows[OTHER].why == f"by profile: 2.00 times as fast as {preferred}"
    assert rows[preferred].why == f"can run; {OTHER} was measured to be faster"
    named = kernels.choose("cpu", {OP: preferred})
    assert (named.names[OP], named.origins[OP]) == (preferred, "config"), "a config goes before a profile"


@pytest.mark.parametrize("times", [LEVEL, NOISY, SLOW])
def test_the_preferred_one_wins_what_is_not_clear(file: Path, preferred: str, times: Any) -> None:
    profile.write("cpu", ops(SLOW, times, preferred))
    assert kernels.choose("cpu").origins[OP] == "preference"


def test_one_shape_in_which_it_is_slower_is_enough(file: Path, preferred: str) -> None:
    found = ops(SLOW, FAST, preferred)
    found[OP]["bf16"]["T=8,H=8"] = {preferred: FAST, OTHER: SLOW}
    profile.write("cpu", found)
    assert kernels.choose("cpu").origins[OP] == "preference"
    found[OP]["bf16"]["T=8,H=8"] = {preferred: SLOW, OTHER: LEVEL}
    profile.write("cpu", found)
    assert kernels.choose("cpu").names[OP] == OTHER


def test_each_dtype_has_its_own_and_all_count_where_none_is_named(file: Path, preferred: str) -> None:
    profile.write("cpu", ops(SLOW, FAST, preferred, "bf16"))
    assert kernels.choose("cpu", dtype=torch.float32).names[OP] == preferred, "nothing was measured in it"
    profile.write("cpu", ops(FAST, SLOW, preferred, "fp32"))
    assert kernels.choose("cpu", dtype=torch.bfloat16).names[OP] == OTHER
    assert kernels.choose("cpu", dtype=torch.float32).names[OP] == preferred
    assert kernels.choose("cpu").names[OP] == preferred
    profile.write("cpu", ops(SLOW, FAST, preferred, "fp32"))  # what is measured again is replaced
    assert kernels.choose("cpu").names[OP] == OTHER


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_profile_does_not_stand_in_the_way_of_asking_about_cuda(file: Path, preferred: str) -> None:
    profile.write("cpu", ops(SLOW, FAST, preferred))
    assert "hardware was " in profile.load("cuda").state
    assert {row.op for row in kernels.table("cuda") if row.chosen} == set(kernels.registry.OPS)


def test_what_cannot_run_is_not_chosen(file: Path, preferred: str) -> None:
    profile.write("cpu", {OP: {"bf16": {SHAPE: {preferred: SLOW, "triton": FAST, "gone": FAST}}}})
    assert kernels.choose("cpu").origins[OP] == "preference"


@pytest.mark.parametrize("name", ["hardware", "torch", "version", "level", "threads"])
def test_a_profile_of_something_else_is_left_aside_with_the_reason(file: Path, preferred: str, name: str) -> None:
    profile.write("cpu", ops(SLOW, FAST, preferred))
    content = json.loads(file.read_text())
    here, content["profiles"][0]["key"][name] = content["profiles"][0]["key"][name], "other"
    file.write_text(json.dumps(content))
    assert kernels.choose("cpu").origins[OP] == "preference"
    assert profile.load("cpu").state == f"ignored: {file}: {name} was other and is {here}"


def test_machines_share_a_file_and_old_versions_go(file: Path, preferred: str) -> None:
    profile.write("cpu", ops(SLOW, FAST, preferred))
    for name, stays in (("hardware", True), ("threads", True), ("torch", False), ("version", False)):
        content = json.loads(file.read_text())
        content["profiles"] = content["profiles"][-1:]
        content["profiles"][0]["key"][name] = "other"
        file.write_text(json.dumps(content))
        profile.write("cpu", ops(SLOW, FAST, preferred))
        assert len(json.loads(file.read_text())["profiles"]) == 1 + stays
        assert kernels.choose("cpu").names[OP] == OTHER
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no temporary file stays"


NO_TIMES = '{"format": 1, "profiles": [{"key": {}, "made": "", "ops": {"gelu": {"bf16": {"T=1": {"torch": %s}}}}}]}'


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"format": 1}', '{"format": 2, "profiles": []}', '{"format": 1, "profiles": [{}]}',
        NO_TIMES % "[3, 2, 1]", NO_TIMES % '[1, "x", 1]', NO_TIMES % "[1, 2]", NO_TIMES % "7",
        '{"format": 1, "profiles": [{"key": 7, "made": "", "ops": {}}]}', "\udcff",
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(file: Path, preferred: str, content: str) -> None:
    file.parent.mkdir()
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=f"ignored: {file} cannot be read as a profile .*; write it again"):
        assert kernels.choose("cpu").names[OP] == preferred
    profile.write("cpu", ops(SLOW, FAST, preferred))
    assert kernels.choose("cpu").names[OP] == OTHER


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGAPRE_KERNEL_PROFILE", "off")
    assert profile.path() is None and profile.load("cpu").state == "off: MEGAPRE_KERNEL_PROFILE=off"
    with pytest.raises(ValueError, match="unset it"):
        profile.write("cpu", {})
    monkeypatch.delenv("MEGAPRE_KERNEL_PROFILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert profile.path() == tmp_path / "megapre" / "kernel-profile.json"
    assert profile.load("cpu").state.startswith("none at ")
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert profile.path() == Path("/home/someone/.config/megapre/kernel-profile.json")


def test_the_key_names_this_machine() -> None:
    key = profile.key("cpu")
    assert key["torch"] == torch.__version__ and key["threads"] == torch.get_num_threads() and key["hardware"]
    from megapre import __version__

    assert key["version"] == __version__
