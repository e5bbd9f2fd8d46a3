"""One command that proves megapre on the GPU at hand: `make gpu-check`, or `python benchmarks/gpu_check.py`.

It uses the interpreter that runs it and needs no network: the native libraries, CUDA kernels among them, are built in
place, Triton's cache is filled on all cores, then the GPU tests, compute-sanitizer on small shapes, every
implementation of every op against its peers, and a training step against its peers run one after the other, each in a
process of its own under a time limit. A part may use what earlier ones have left of theirs, but not the seconds that
are kept for those to come. What it printed is kept in its log; one that fails or runs out of time does not stop the
next. The summary is written after every part, so a run that is cut off keeps what it had:

    benchmarks/results/gpu_check_<hardware>_<date>.{json,md}     the summary
    benchmarks/results/gpu_check_<hardware>_<date>_logs/*.log    what each part printed (not for the repository)
    benchmarks/results/{kernels,train_step}_*<hardware>_<date>.*  written by the parts themselves

Exit status: 0 when every part that was asked for passed, 1 otherwise, 2 when there is no usable GPU,
with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    """A command of the check: its name, what it shows, how long it may run, and its arguments.

    `kept_s`: seconds that earlier parts must leave it. "{seconds}" in an argument becomes the seconds it has, less
    ENDING_S.
    """

    name: str
    shows: str
    limit_s: int
    kept_s: int
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a part. `status` is passed, failed, timed out, or skipped (with the reason in `note`)."""

    name: str
    status: str
    seconds: float
    note: str


ANOTHER = "choose a python with a CUDA build of torch and Triton, as in make gpu-check PYTHON=.venv/bin/python"


class NoGpu(Exception):
    """This machine, or this interpreter, has nothing to check; the message says what would work."""


def hardware() -> dict[str, str | int]:
    """The GPU and the software under it, as its own torch reports them. NoGpu where there is none to check."""
    try:
        import torch
    except ImportError as error:
        raise NoGpu(f"{PYTHON} has no usable torch ({error}): {ANOTHER}") from None
    if torch.version.cuda is None:
        raise NoGpu(f"torch {torch.__version__} of {PYTHON} is built for the CPU alone: {ANOTHER}")
    if not torch.cuda.is_available():
        raise NoGpu(f"torch {torch.__version__} of {PYTHON} finds no GPU: see what nvidia-smi says")
    try:
        import triton
    except ImportError as error:
        raise NoGpu(f"{PYTHON} has no usable Triton ({error}): {ANOTHER}") from None
    gpu = torch.cuda.get_device_properties(0)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {
        "gpu": gpu.name,
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def output_of(*command: str) -> str:
    """What a command printed, stripped; empty when it failed or is not on this machine."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit measured, with '+' when the tree differs from it; 'unknown' outside a checkout."""
    head = output_of("git", "rev-parse", "--short", "HEAD")
    return head + ("+" if output_of("git", "status", "--porcelain") else "") if head else "unknown"


def parts(out: Path) -> list[Part]:
    """Every part of the check, in the order they run; `out` is where they write results."""
    to = os.path.relpath(out, ROOT)  # the results quote their command
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    return [
        Part(
            "build",
            "the native libraries build against this torch",
            200,
            140,
            [PYTHON, "setup.py", "build_ext", "--inplace"],
            {"MEGAPRE_NATIVE": "1", "MEGAPRE_CUDA": "1"},
        ),
        Part("doctor", "what the machine offers and which kernels run", 40, 10, [PYTHON, "-m", "megapre", "doctor"]),
        Part(
            "precompile",
            "every Triton kernel compiles for this GPU, at real sizes",
            90,
            25,
            [PYTHON, "benchmarks/precompile.py"],
        ),
        Part(
            "tests",
            "every test marked gpu, in processes beside each other",
            250,
            100,
            [PYTHON, "benchmarks/gpu_tests.py", "--seconds={seconds}", f"--out={to}/gpu_tests_logs"],
        ),
        Part(
            "sanitizer",
            "no invalid access in the kernels on small shapes",
            120,
            50,
            [*sanitizer, PYTHON, "benchmarks/gpu_small_shapes.py"],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        Part(
            "kernels",
            "every implementation of every op against its peers, the measured ceilings and the goals",
            200,
            100,
            [
                *(PYTHON, "-m", "megapre", "bench", "kernels", "--set=gpu", "--device=cuda"),
                *(f"--out={to}", "--budget={seconds}"),
            ],
        ),
        Part(
            "train-step",
            "the training step against peers",
            190,
            95,
            [
                *(PYTHON, "benchmarks/train_step.py", "--device=cuda", "--repeats=1"),
                *(f"--out={to}", "--budget={seconds}"),
            ],
        ),
    ]


ENDING_S = 20
"""Of a part's time, what it has to write down its results after it was told to end."""


def share(part: Part, later: Sequence[Part], left_s: float) -> float:
    """The seconds that `part` may run, of those that are left for it and all `later` ones."""
    return min(part.limit_s, left_s - sum(other.kept_s for other in later))


def run_part(part: Part, log: Path, limit_s: float) -> Outcome:
    """Run one part, its output into `log`; never raises for a part that fails."""
    environment = {**os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [argument.replace("{seconds}", f"{max(limit_s - ENDING_S, 10):.0f}") for argument in part.command],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            stop(process)
            status = "timed out"
        except BaseException:  # Ctrl-C reaches this process alone
            stop(process)
            raise
    return Outcome(part.name, status, round(time.monotonic() - start, 1), last_line(log))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a part: an interrupt first, on which pytest and the benchmarks print what they have, then by force."""
    for number, patience_s in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=patience_s)
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    """The last line of a log that says something, without the decoration of pytest's bars and terminal colours."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" =") for line in log.read_text(errors="replace").split("\n")]
    return next((line[:160] for line in reversed(lines) if line), "")


def write_summary(out: Path, stem: str, machine: dict[str, str | int], outcomes: list[Outcome]) -> None:
    """The summary as JSON and as a table, by one rename each."""
    report = {"hardware": machine, "parts": [asdict(outcome) for outcome in outcomes]}
    rows = [f"# gpu-check on {machine['gpu']}, {stem.rsplit('_', 1)[1]}", ""]
    rows += [f"- {key}: {value}" for key, value in machine.items()]
    rows += ["", "| part | status | seconds | last line |", "| --- | --- | ---: | --- |"]
    rows += [f"| {o.name} | {o.status} | {o.seconds} | {o.note.replace('|', '/')} |" for o in outcomes]
    for suffix, text in ((".json", json.dumps(report, indent=1)), (".md", "\n".join(rows))):
        temporary = out / f".{stem}{suffix}"
        temporary.write_text(text + "\n")
        temporary.replace(out / f"{stem}{suffix}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in parts(ROOT)]
    parser.add_argument("--parts", default=",".join(names), help=f"comma-separated, of: {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--limit", type=float, default=520, help="seconds for everything together")
    arguments = parser.parse_args()
    wanted = arguments.parts.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"unknown parts {unknown}; there are {names}")

    deadline = time.monotonic() + arguments.limit
    try:
        machine = hardware()
    except NoGpu as why:
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    hardware_slug = re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower()).strip("-")
    stem = f"gpu_check_{hardware_slug}_{datetime.date.today().isoformat()}"
    logs = out / f"{stem}_logs"
    logs.mkdir(parents=True, exist_ok=True)

    outcomes: list[Outcome] = []
    chosen = [part for part in parts(out) if part.name in wanted]
    for number, part in enumerate(chosen):
        left = share(part, chosen[number + 1 :], deadline - time.monotonic())
        if left < 10:
            outcomes.append(Outcome(part.name, "skipped", 0.0, f"{left:.0f} s left of {arguments.limit:.0f} s"))
        elif not shutil.which(part.command[0]):
            outcomes.append(Outcome(part.name, "skipped", 0.0, f"{part.command[0]} is not on this machine"))
        else:
            print(f"{part.name}: {part.shows} ({left:.0f} s) ...", flush=True)
            outcomes.append(run_part(part, logs / f"{part.name}.log", left))
        print(f"{part.name}: {outcomes[-1].status}, {outcomes[-1].seconds} s: {outcomes[-1].note}", flush=True)
        write_summary(out, stem, machine, outcomes)
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
