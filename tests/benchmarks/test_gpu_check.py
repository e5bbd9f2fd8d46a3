"""The check of a GPU machine, on a machine without one: commands of our own in place of its parts."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
MACHINE = {"gpu": "A Fake GPU", "memory_bytes": 1, "torch": "2.13.0"}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("gpu_check")
    monkeypatch.setattr(module, "hardware", lambda: MACHINE)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(
    check: ModuleType, parts: list, out: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list]:
    monkeypatch.setattr(check, "parts", lambda to: parts)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", f"--out={out}", *arguments])
    code = check.main()
    (summary,) = out.glob("gpu_check_a-fake-gpu_*.json")
    return code, json.loads(summary.read_text())["parts"]


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "ENDING_S", 0)
    endless = "import time; print('half', flush=True); time.sleep(600)"
    parts = [
        check.Part("build", "", 60, 1, python("print('built'); raise SystemExit(3)")),
        check.Part("tests", "", 12, 1, python(endless)),
        check.Part("gone", "", 60, 1, ["no-such-command"]),
        check.Part("kernels", "", 60, 1, [*python("import sys; print(sys.argv[1])"), "--budget={seconds}"]),
    ]
    code, found = run(check, parts, tmp_path, "--limit=100", monkeypatch=monkeypatch)
    assert code == 1
    assert [(part["name"], part["status"]) for part in found] == [
        ("build", "failed"),
        ("tests", "timed out"),
        ("gone", "skipped"),
        ("kernels", "passed"),
    ]
    assert found[0]["note"] == "built" and "not on this machine" in found[2]["note"]
    assert found[3]["note"] == "--budget=60"
    (logs,) = tmp_path.glob("*_logs")
    assert (logs / "tests.log").read_text().startswith("half"), "what a part that was cut off had printed is kept"


def test_earlier_parts_leave_later_ones_their_time(check: ModuleType) -> None:
    parts = check.parts(ROOT)
    assert sum(part.kept_s for part in parts) <= 520, "with every part at its least the check ends in time"
    first, *later = parts
    assert check.share(first, later, 520) == min(first.limit_s, 520 - sum(part.kept_s for part in later))
    assert check.share(first, [], 1000) == first.limit_s
    left = 520.0
    for number, part in enumerate(parts):  # however long each one takes
        given = check.share(part, parts[number + 1 :], left)
        assert given >= part.kept_s, part.name
        left -= given


def test_parts_are_chosen_by_name_and_their_commands_are_there(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in check.parts(tmp_path):
        files = [argument for argument in part.command if argument.endswith(".py")]
        assert all((ROOT / file).exists() for file in files), part.name
    parts = [check.Part(name, "", 60, 1, python(f"print({name!r})")) for name in ("a", "b", "c")]
    code, found = run(check, parts, tmp_path, "--parts=a,c", monkeypatch=monkeypatch)
    assert code == 0 and [part["name"] for part in found] == ["a", "c"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--parts=d"])
    with pytest.raises(SystemExit):
        check.main()


@pytest.mark.parametrize(
    ("cuda", "missing", "reason"),
    [
        (None, "torch", "has no usable torch (import of torch halted"),
        (None, "", "is built for the CPU alone: choose a python with a CUDA build of torch and Triton"),
        ("13.0", "", "finds no GPU: see what nvidia-smi says"),
    ],
)
def test_a_machine_without_a_gpu_is_told_why_in_one_line(
    cuda: str | None,
    missing: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", f"--out={tmp_path}"])
    assert script("gpu_check").main() == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1 and sys.executable in said
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_triton_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    check = script("gpu_check")
    with pytest.raises(check.NoGpu, match=r"has no usable Triton .* make gpu-check PYTHON=\.venv/bin/python"):
        check.hardware()


FILES = {
    "test_one.py": "def test_a(): pass\ndef test_b(): assert False\n",
    "test_two.py": "import pytest\n@pytest.mark.parametrize('x', ['p q', 'r[1]'])\ndef test_c(x): pass\n"
    "def test_d(): pytest.skip('no')\n",
}


@pytest.mark.parametrize("jobs", [1, 3])
def test_shares_of_tests_run_beside_each_other(jobs: int, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    command = [
        sys.executable,
        "benchmarks/gpu_tests.py",
        f"--jobs={jobs}",
        "--mark=not gpu",
        f"--out={tmp_path / 'out'}",
        f"--root={tmp_path}",
        ".",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "3 passed, 1 failed, 1 skipped, 0 of 5 not run" in done.stdout and "test_b" in done.stdout


def test_tests_that_did_not_end_in_time_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\ndef test_c(): pass\n"
    )
    command = [sys.executable, "benchmarks/gpu_tests.py", "--jobs=1", "--mark=not gpu", "--seconds=25"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}", f"--root={tmp_path}", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "1 passed, 0 failed, 0 skipped, 2 of 3 not run: time was up" in done.stdout


ONE_PART = """
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
import gpu_check
code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
gpu_check.run_part(gpu_check.Part("endless", "", 60, 1, [sys.executable, "-c", code]), Path(sys.argv[1]), 60)
"""


@pytest.mark.parametrize("what", ["a part", "tests"])
def test_an_interrupt_leaves_nothing_running(what: str, tmp_path: Path) -> None:
    """What they start leads sessions of its own, so that the terminal's Ctrl-C does not reach it."""
    said = tmp_path / "said"
    if what == "a part":
        command = ["-c", ONE_PART, str(said)]
    else:
        body = f"import os, time\ndef test_a():\n    open({str(said)!r}, 'w').write(f'{{os.getpid()}}\\n')\n"
        (tmp_path / "test_endless.py").write_text(f"{body}    time.sleep(600)\n")
        command = ["benchmarks/gpu_tests.py", "--jobs=1", "--mark=not gpu", f"--out={tmp_path / 'out'}"]
        command += [f"--root={tmp_path}", "."]
    running = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not (said.exists() and said.read_text().endswith("\n")):
        assert time.monotonic() < end and running.poll() is None, "it never began"
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    started = Path(f"/proc/{said.read_text().strip()}/stat")
    while started.exists() and started.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "what it started lives on"
        time.sleep(0.05)


def test_kernels_compile_into_tritons_cache_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "benchmarks/precompile.py", "--capability=80", "--cases=rope 12", "--jobs=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 launches compiled for sm_80, 0 cases failed" in done.stdout
    assert len(list(tmp_path.rglob("*.cubin"))) == 4
