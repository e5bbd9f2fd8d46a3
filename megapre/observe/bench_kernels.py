"""`megapre bench kernels`: which implementation of an op is fastest on this machine, and how far from its limits.

The cases and the timer are those of `kernels.bench`; the rows become a table, files that are complete after every case,
and the profile by which the registry chooses.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from .bench_request import BenchRequestError, Request, plans

if TYPE_CHECKING:
    from ..kernels.bench.row import Held, Row
    from ..kernels.bench.run import Plan, Runner

LEAST_BYTES = 1 << 20  # that a call must move for a profile to keep its time: below, it is the time of calling


@dataclass
class Report:
    """What came out: `rows`, the rates that bound them, what met its goal, and of what machine and settings they
    speak."""

    about: dict[str, str | int | float | bool]
    ceilings: dict[str, float]
    rows: list[Row]
    held: list[Held]

    @property
    def device(self) -> str:
        return str(self.about["device"])


def run(request: Request, out: str | None = None, write_profile: bool = False) -> int:
    """Measures, prints the table, writes the files. 0; 1 where one of our implementations failed or was wrong, or a
    whole case did; 130 after Ctrl-C, with what was measured until then."""
    from rich.console import Console

    from . import bench_report

    if write_profile:
        _refuse_profile(request)
    device = _prepare(request)
    planned = plans(request, device)
    from ..kernels.bench.run import Runner

    runner = Runner(device, request.providers, request.repeats, request.cold)
    console = Console(width=None if sys.stdout.isatty() else bench_report.WIDTH)
    about = describe(request, device, runner)
    console.print(bench_report.header(about))
    interrupted = False
    cases = 0

    def report() -> Report:
        counts = {"cases": len(planned), "cases_measured": cases, "interrupted": interrupted}
        return Report({**about, **counts}, runner.ceilings.best, runner.finish(), runner.held())

    try:
        for _ in _progress(runner, planned, request.budget):
            cases += 1
            if out is not None and runner.rows:
                bench_report.write(report(), out, picture=False)
    except KeyboardInterrupt:
        interrupted = True
    if cases == len(planned) and not runner.rows:
        wanted = ", ".join(request.providers)
        raise BenchRequestError(f"bench kernels: these ops have no {wanted} on {device}; --list shows what each has")
    result = report()
    for renderable in bench_report.tables(result):
        console.print(renderable)
    if out is not None:
        for line in bench_report.write(result, out):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if interrupted:
        print("megapre: interrupted; the profile was not written" if write_profile else "megapre: interrupted")
        return 130
    if write_profile:
        _write_profile(device, result.rows)
    return int(any(broken(row) for row in result.rows))


def broken(row: Row) -> bool:
    """Whether a kernel of ours, or what is in use, failed or computed something else, or a whole case failed. One may
    refuse a call by a ValueError, and a case be too large for the device.
    """
    from ..kernels.bench.row import EVERY

    allowed = ("OutOfMemoryError",) if row.provider == EVERY else ("skipped", "ValueError")
    ours = row.in_use or row.provider in ("native", "triton", "cuda", EVERY)
    return ours and bool(row.note) and not row.note.startswith(allowed)


def show(device: str) -> int:
    """Prints each op with the sizes it needs and its providers."""
    from rich.console import Console
    from rich.table import Table

    device = _kind(device)
    from ..kernels.bench import cases

    table = Table("op", "sizes", "providers", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    tiny = {**dict.fromkeys("TSHFVPIO", 8), "B": 1, "N": 2, "K": 1, "D": 4}
    for op in cases.ops():
        providers = cases.build(op, tiny, "bf16", device).providers()
        names = [name for name, provider in providers.items() if not provider.why_not]
        table.add_row(op, " ".join(cases.NEEDS[op]), ", ".join(names))
    console = Console(width=None if sys.stdout.isatty() else 118)
    console.print(table)
    console.print("\n" + ", ".join(f"{name} {meaning}" for name, meaning in cases.LEGEND.items()), highlight=False)
    return 0


def _kind(device: str) -> str:
    import torch

    from ..train.machine import DeviceError

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"bench kernels: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _prepare(request: Request) -> str:
    """The device, with the settings that a training run has on it."""
    from ..train import cpu_runtime

    device = _kind(request.device)
    cpu_runtime.set_threads(request.threads)
    if device == "cpu" and request.keep_memory:
        cpu_runtime.keep_freed_memory()
    return device


def describe(request: Request, device: str, runner: Runner) -> dict[str, str | int | float | bool]:
    """The machine and the settings, as they go to the head of the table and into the files."""
    import torch

    from ..kernels import native, profile

    about: dict[str, str | int | float | bool] = {
        "hardware": profile.hardware(device),
        "device": device,
        "torch": torch.__version__,
        "megapre": __version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["megapre", *sys.argv[1:]]),
        "counts": runner.timer.by,
        "repeats": request.repeats,
        "caches": "emptied before each call" if request.cold else "as they are",
    }
    if device == "cpu":
        about |= {"threads": torch.get_num_threads(), "level": native.cpu_level() or "no native ops"}
        kept = "freed memory is kept, as in a training run"
        about["memory"] = kept if request.keep_memory else "freed memory is returned, as in plain torch"
    about["profile"] = profile.load(device).state
    return about


def commit() -> str:
    """The commit that is measured, with a plus where the files differ from it; "none" outside a checkout."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD") if (root / ".git").exists() else ""
        return head + ("+" if git("status", "--porcelain") else "") if head else "none"
    except OSError:
        return "none"


def _progress(runner: Runner, planned: list[Plan], budget: float) -> Iterator[list[Row]]:
    """The run, with a bar on a terminal that says how far it is, and on a GPU else a line for each case."""
    if not sys.stderr.isatty():
        for number, rows in enumerate(runner.run(planned, budget), 1):
            if rows and runner.device != "cpu":
                print(f"{number} of {len(planned)}: {rows[0].op} {rows[0].shape}", file=sys.stderr, flush=True)
            yield rows
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("cases"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("cases", total=len(planned))
        for rows in runner.run(planned, budget):
            bar.advance(task)
            yield rows


def _refuse_profile(request: Request) -> None:
    from ..kernels import profile

    if profile.path() is None:
        raise BenchRequestError(
            "bench kernels: MEGAPRE_KERNEL_PROFILE=off turns the profile off; unset it to write one"
        )
    if request.modes and "full" not in request.modes:
        raise BenchRequestError("bench kernels: a profile compares the mode full; add it to --mode")
    if request.providers:
        raise BenchRequestError("bench kernels: a profile compares all implementations; leave out --provider")
    if not request.cold or not request.keep_memory:
        option = "--return-memory" if request.cold else "--warm"
        raise BenchRequestError(
            f"bench kernels: a profile is made under the conditions of training; leave out {option}"
        )


def profile_of(rows: list[Row]) -> dict[str, dict[str, dict[str, dict[str, tuple[float, float, float]]]]]:
    """What a profile keeps of these rows: times of the registry's implementations as training calls them.

    The shapes are those of training too: times of calls that move less than LEAST_BYTES say nothing of those.
    """
    from ..kernels.registry import IMPLEMENTATIONS, OPS

    known = {(row.op, row.name) for row in IMPLEMENTATIONS}
    found: dict[str, dict[str, dict[str, dict[str, tuple[float, float, float]]]]] = {}
    for row in rows:
        as_trained = row.mode in ("full", "step") and row.repeats and row.bytes >= LEAST_BYTES
        if as_trained and row.op in OPS and (row.op, row.provider) in known:
            shapes = found.setdefault(row.op, {}).setdefault(row.dtype, {})
            shapes.setdefault(row.shape, {})[row.provider] = (row.min_ms, row.p20_ms, row.p80_ms)
    return found


def _write_profile(device: str, rows: list[Row]) -> None:
    from ..kernels import choose, profile
    from ..kernels.bench.case import DTYPES

    found = profile_of(rows)
    if not found:
        raise BenchRequestError(
            "bench kernels: no profile is written: no op was timed forward and backward in a shape that "
            "moves 1 MiB or more; name larger shapes, or raise --budget"
        )
    file = profile.write(device, found)
    print(f"profile written to {file}; this machine's runs use it")
    for dtype in dict.fromkeys(dtype for of in found.values() for dtype in of):
        ops = choose(device, None, DTYPES[dtype])
        changed = [op for op, origin in ops.origins.items() if origin == "profile" and dtype in found.get(op, {})]
        names = ", ".join(f"{op}: {ops.names[op]}" for op in changed)
        print(f"  {dtype}: {names or 'the preferred implementations are the fastest, or not clearly slower'}")
