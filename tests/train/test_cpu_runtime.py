"""What a run makes of the CPU it finds: counted on made-up machines, applied in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapre.train import cpu_runtime
from megapre.train.cpu_runtime import Cpus, before_torch, decide_threads, look


def machine(root: Path, cpus: int = 8, hyperthreads: int = 2) -> Path:
    """A made-up / with CPUs whose core siblings are numbered as most kernels do: 0 and 4, 1 and 5, ..."""
    cores = cpus // hyperthreads
    for cpu in range(cpus):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        siblings = ",".join(str(cpu % cores + cores * thread) for thread in range(hyperthreads))
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_hyperthreads_are_one_core(tmp_path: Path) -> None:
    assert look(machine(tmp_path), set(range(8))) == Cpus(usable=8, cores=4, quota=None)


def test_affinity_counts_the_cores_it_reaches(tmp_path: Path) -> None:
    assert look(machine(tmp_path), {0, 4, 1}) == Cpus(usable=3, cores=2, quota=None)
    assert look(tmp_path, {4, 5, 6}) == Cpus(usable=3, cores=3, quota=None)


def test_without_topology_a_cpu_is_a_core(tmp_path: Path) -> None:
    assert look(tmp_path, {0, 1, 2}) == Cpus(3, 3, None)


def test_the_tightest_quota_of_version_2_counts(tmp_path: Path) -> None:
    machine(tmp_path)
    write(tmp_path / "proc/self/cgroup", "0::/kubepods/pod/box")
    write(tmp_path / "sys/fs/cgroup/kubepods/cpu.max", "300000 100000")
    write(tmp_path / "sys/fs/cgroup/kubepods/pod/cpu.max", "250000 100000")
    write(tmp_path / "sys/fs/cgroup/kubepods/pod/box/cpu.max", "max 100000")
    assert look(tmp_path, set(range(8))) == Cpus(8, 4, 2.5)


def test_a_container_sees_its_own_quota_at_the_top(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/docker-12.scope")  # the host's path, not to be found here
    write(tmp_path / "sys/fs/cgroup/cpu.max", "50000 100000")
    assert look(tmp_path, {0, 1}) == Cpus(2, 2, 0.5)


@pytest.mark.parametrize(("quota", "expected"), [("150000", 1.5), ("-1", None)])
def test_quota_of_version_1(tmp_path: Path, quota: str, expected: float | None) -> None:
    write(tmp_path / "proc/self/cgroup", "9:name=systemd:/x\n4:memory:/y\n3:cpuset:/z\n2:cpu,cpuacct:/jobs/7\n0::/")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_quota_us", quota)
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_period_us", "100000")
    assert look(tmp_path, {0, 1}) == Cpus(2, 2, expected)


@pytest.mark.parametrize("text", ["", "max", "100000", "100000 0", "many 100000", "max 100000"])
def test_what_is_no_quota_limits_nothing(tmp_path: Path, text: str) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/")
    write(tmp_path / "sys/fs/cgroup/cpu.max", text)
    assert look(tmp_path, {0}) == Cpus(1, 1, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cores are counted on Linux only")
def test_this_machine_has_cores() -> None:
    found = look()
    assert found is not None
    assert 1 <= found.cores <= found.usable == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cpus", "number"),
    [
        (Cpus(16, 8, None), 8),
        (Cpus(16, 8, 12.0), 8),
        (Cpus(16, 8, 2.5), 2),  # a third thread would have all of them stopped half of the time
        (Cpus(16, 8, 0.5), 1),
        (Cpus(1, 1, None), 1),
        (None, 0),
    ],
)
def test_threads_are_physical_cores_within_the_quota(cpus: Cpus | None, number: int) -> None:
    assert decide_threads(0, cpus, {}).number == number


@pytest.mark.parametrize("variable", [*cpu_runtime.THREADS, *cpu_runtime.PINNING])
def test_the_users_variables_decide_unless_the_recipe_does(variable: str) -> None:
    cpus = Cpus(16, 8, None)
    assert decide_threads(0, cpus, {variable: "3"}) == (0, f"{variable}=3")
    assert decide_threads(5, cpus, {variable: "3"}) == (5, "run.threads")


def test_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*cpu_runtime.THREADS, *cpu_runtime.PINNING):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cpu_runtime, "look", lambda: Cpus(4, 2, None))
    before = torch.get_num_threads()
    try:
        cpu_runtime.set_threads(0)
        assert torch.get_num_threads() == 2
        cpu_runtime.set_threads(3)
        assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        cpu_runtime.set_threads(0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "THP_MEM_ALLOC_ENABLE": "1"}),
        ({"GOMP_SPINCOUNT": "7"}, {"THP_MEM_ALLOC_ENABLE": "1"}),
        ({"OMP_WAIT_POLICY": "active", "THP_MEM_ALLOC_ENABLE": "0"}, {}),
    ],
)
def test_a_variable_of_the_user_is_untouched(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], added: dict[str, str]
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    environment = dict(given)
    before_torch(environment)
    assert environment == {**given, **added}


def test_after_torch_nothing_is_set() -> None:
    environment: dict[str, str] = {}
    before_torch(environment)
    assert environment == {}


def python(code: str, **variables: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_command_line_sets_it_before_torch_is_loaded() -> None:
    code = (
        "import os, sys\nfrom megapre.cli import cli\n"
        "cli(['train', 'debug', '--print-config'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and os.environ['GOMP_SPINCOUNT'] == '1000'\n"
        "import torch"
    )
    shown = python(code, OMP_DISPLAY_ENV="VERBOSE")
    if "GOMP_SPINCOUNT" in shown:  # this torch runs on GNU OpenMP, which shows what it has read
        assert "GOMP_SPINCOUNT = '1000'" in shown


FAULTS = """
import resource, torch
from megapre.train import cpu_runtime
{keep}
def step():
    return [torch.ones(size, dtype=torch.uint8) for size in (48_000_000, 36_000_000, 9_000_000)]
for _ in range(20): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(cpu_runtime._mallopt() is None, reason="no glibc")
def test_kept_memory_is_not_faulted_in_anew() -> None:
    assert int(python(FAULTS.format(keep="cpu_runtime.keep_freed_memory()"), THP_MEM_ALLOC_ENABLE="0")) < 50
    assert int(python(FAULTS.format(keep=""), THP_MEM_ALLOC_ENABLE="0")) > 5000, "the test shows nothing here"


def test_doctor_has_a_line_for_each_decision() -> None:
    lines = dict(cpu_runtime.facts({"OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": "close"}))
    assert lines["waiting threads"] == "OMP_WAIT_POLICY=passive"
    assert lines["pinning"] == "OMP_PROC_BIND=close"
    assert lines["threads of a run"] == "decided by OMP_PROC_BIND=close"
    assert "not asked for" in lines["huge pages"]
    assert "freed memory" in lines
