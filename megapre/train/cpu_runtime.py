"""How a run uses the CPU: how many threads, how they wait for one another, and what becomes of freed memory.

`before_torch` sets environment variables that OpenMP and torch read once, when they are loaded: the command line calls
it first of all. `set_threads` and `keep_freed_memory` are called when a run begins. What the user has set stays.

Threads. One for each physical core that the process may use: two hyperthreads of a core share its vector units, so the
second brings a product nothing and doubles the cost of every barrier. torch counts physical cores too, but not the CPU
quota of a container: threads beyond it make the kernel stop all of them until the next period.

Waiting. A thread that reaches the end of a parallel region early spins before it sleeps, 300,000 times in GNU OpenMP:
5 to 14 ms, for `pause` takes 40 to 140 cycles. That is longer than the time slice of the scheduler. When the partner
has lost its core to another process, the spinning thread burns its own share of the other core, is itself put to the
back of the queue for it, and both meet ever more seldom. The best a waiter can do without knowing how long is to spin
for about as long as sleep and wake-up cost (Karlin et al. 1991, "Empirical studies of competitive spinning"), some
20-50 us: 1,000 times.

Pinning. None by default: a pinned thread cannot leave a core that another process has taken. It gains where threads
would wander between the sockets of a server that is otherwise idle: OMP_PROC_BIND=close OMP_PLACES=cores.

Memory. torch has no caching allocator on the CPU: glibc would return each large tensor to the kernel when it is freed,
and map, zero and fault in the next page by page. Kept memory ends that; huge pages make the rest 512 times rarer.

Measured, ms of a step of the demo's model in bf16 on two threads, and of GPT-2 124M's width with 4 layers for memory;
AMD EPYC (Zen 4), two cores, torch 2.13, 2026-11-21:

    spins                        300,000 (GNU)      1,000       300         0
    alone (best of 10)                     141        146         -       156
    one busy process beside            490-720    340-470       317   276-308      pinned: 357, one thread: 265

    memory                  given back      kept    kept, huge pages
    page faults, first step    226,000   131,000              23,000
    page faults, later ones    214,000         1                   1
    step (best of 5, medians)     3200      3080                3050
    peak, MiB (medians)           2024      2082                1965
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping

SPINS = 1000
# mallopt parameters of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


class Cpus(NamedTuple):
    """What this process may compute on. `quota` is in CPUs (1.5 = 150% of one); None where nothing limits it."""

    usable: int
    cores: int
    quota: float | None


class Threads(NamedTuple):
    """The decision: `number` is 0 where torch's own number, or what the user's variables made of it, stays."""

    number: int
    why: str


def before_torch(environment: MutableMapping[str, str]) -> None:
    """Sets what OpenMP and torch read when they are loaded. Does nothing once torch is imported: it would be too late.

    GOMP_SPINCOUNT unless it or OMP_WAIT_POLICY is set; THP_MEM_ALLOC_ENABLE, by which torch asks for huge pages for
    tensors of 2 MiB and more, unless it is set.
    """
    if "torch" in sys.modules:
        return
    if not any(variable in environment for variable in WAITING):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def set_threads(asked: int) -> None:
    """Tells torch how many threads to compute with. `asked` is run.threads; 0 leaves the choice."""
    import torch

    number = decide_threads(asked, look(), os.environ).number
    if number:
        torch.set_num_threads(number)


def decide_threads(asked: int, cpus: Cpus | None, environment: Mapping[str, str]) -> Threads:
    """How many threads to compute with: `asked` (run.threads), else what the user's variables say, else `cpus`."""
    if asked:
        return Threads(asked, "run.threads")
    for variable in (*THREADS, *PINNING):
        if variable in environment:  # who pins has counted; and the first thread, pinned, can see its own core alone
            return Threads(0, f"{variable}={environment[variable]}")
    if cpus is None:
        return Threads(0, "torch's own number: cores are counted on Linux only")
    whole = max(int(cpus.quota), 1) if cpus.quota is not None else cpus.cores
    if whole < cpus.cores:
        return Threads(whole, f"a quota of {cpus.quota:g} CPUs; {cpus.cores} physical cores")
    return Threads(cpus.cores, f"physical cores; {cpus.usable} usable CPUs")


def look(root: Path = Path("/"), usable: set[int] | None = None) -> Cpus | None:
    """The CPUs of this process: its affinity (`usable` overrides it), their cores, its cgroup's quota.

    None elsewhere than on Linux. `root` is where /sys and /proc are looked for.
    """
    if usable is None:
        if not sys.platform.startswith("linux"):
            return None
        usable = os.sched_getaffinity(0)
    cores = {_siblings(root / f"sys/devices/system/cpu/cpu{cpu}/topology", cpu) for cpu in usable}
    return Cpus(len(usable), len(cores), min(_quotas(root), default=None))


def _siblings(topology: Path, cpu: int) -> str:
    """A text that all hyperthreads of a core share; where the kernel does not tell, a CPU is a core."""
    for name in ("core_cpus_list", "thread_siblings_list"):  # the new name and the old one
        if text := _read(topology / name):
            return text
    return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas of this process's cgroup and of all above it, in CPUs.

    In a container the path in /proc/self/cgroup may be the host's while /sys/fs/cgroup begins at the container's: what
    is not there is passed over, and the top, always looked at, then is the container's own.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)  # version 2 has no controllers here: 0::/path
        if controllers and "cpu" not in controllers.split(","):
            continue
        here = root / "sys/fs/cgroup" / controllers
        for folder in (here, *(here / step for step in _down(path))):
            quota, _, period = _read(folder / "cpu.max").partition(" ")
            if controllers:
                quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(period):  # unlimited is "max", or -1 in version 1
                yield int(quota) / int(period)


def _down(path: str) -> Iterator[str]:
    """a, a/b and a/b/c for /a/b/c."""
    names = path.strip("/").split("/")
    return ("/".join(names[:end]) for end in range(1, len(names) + 1))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next allocation. Elsewhere than on glibc nothing happens."""
    mallopt = _mallopt()
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never; the largest int would be 2 GiB, less than a large step frees


def _mallopt() -> Callable[[int, int], int] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None


def facts(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is decided here and why, for `megapre doctor`."""
    cpus = look()
    if cpus is not None:
        quota = "no quota" if cpus.quota is None else f"a quota of {cpus.quota:g} CPUs"
        yield "usable", f"{cpus.usable} of {os.cpu_count()} CPUs on {cpus.cores} physical cores, {quota}"
    threads = decide_threads(0, cpus, environment)
    yield "threads of a run", f"{threads.number}: {threads.why}" if threads.number else f"decided by {threads.why}"
    waiting = next((f"{name}={environment[name]}" for name in WAITING if name in environment), "")
    if waiting == f"GOMP_SPINCOUNT={SPINS}":
        waiting += ": a short spin, then sleep, so that a busy neighbour costs little"
    yield "waiting threads", waiting or "as OpenMP has it: torch was imported first"
    pinning = ", ".join(f"{name}={environment[name]}" for name in PINNING if name in environment)
    yield "pinning", pinning or "none: a pinned thread cannot leave a core that another process takes"
    yield "freed memory", "kept (run.keep_memory=false: not)" if _mallopt() else "left to the C library, not glibc"
    kernel = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    asked = "asked for" if environment.get("THP_MEM_ALLOC_ENABLE") == "1" else "not asked for"
    yield "huge pages", f"{asked} (THP_MEM_ALLOC_ENABLE); of the kernel: {kernel or 'none'}"
