"""Runs the tests marked gpu in several processes beside each other, each with an equal share of every file.

    python benchmarks/gpu_tests.py --jobs 12 --seconds 150 --out benchmarks/results/x_logs/tests

Such a test is mostly the compilation of kernels, on the host: on one core they take many minutes. pytest alone is
needed, no plugin. When the time is up every process is interrupted; the counts come from the logs, a line a test, so
they hold for whatever has run, and what has not is counted too. One log a process, in --out.

Exit status: 0 when every test has run and none failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider"]

KINDS = {"PASSED": "passed", "XFAIL": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
OUTCOME = re.compile(rf"(?P<name>\S+?\.py::.*) (?P<kind>{'|'.join(KINDS)})\b")


def collect(root: Path, mark: str, paths: list[str]) -> list[str]:
    """The names of all tests of that mark. Raises SystemExit with pytest's output where it cannot collect."""
    done = subprocess.run(
        [*PYTEST, "-q", "--collect-only", "-m", mark, *paths], cwd=root, capture_output=True, text=True, check=False
    )
    names = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    if done.returncode not in (0, 5):
        raise SystemExit(f"the tests cannot be collected:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return names


def shares(names: list[str], jobs: int) -> list[list[str]]:
    """Equal shares, every file dealt out over all of them: its first tests compile what its later ones launch."""
    return [share for share in (names[start::jobs] for start in range(jobs)) if share]


def start(root: Path, share: list[str], number: int, out: Path) -> subprocess.Popen[bytes]:
    command = [*PYTEST, "-v", "--maxfail=25", *share]
    with (out / f"{number}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def wait(running: list[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Whether all ended in time; those that did not are interrupted, then killed."""
    end, in_time = time.monotonic() + seconds, True
    for signal_number, patience_s in ((None, 0.0), (signal.SIGINT, 15.0), (signal.SIGKILL, 15.0)):
        for process in running:
            if signal_number is not None and process.poll() is None:
                in_time = False
                os.killpg(process.pid, signal_number)
        end = max(end, time.monotonic() + patience_s)
        for process in running:
            try:
                process.wait(timeout=max(end - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                break
    return in_time


def results(out: Path, jobs: int) -> tuple[Counter[str], list[str]]:
    """How many tests passed, failed and were skipped, and the names of those that failed, from the logs."""
    found: dict[str, str] = {}
    for number in range(jobs):
        for line in (out / f"{number}.log").read_text(errors="replace").splitlines():
            if outcome := OUTCOME.match(line):  # a failure of the teardown comes after the test's own line
                found[outcome["name"]] = KINDS[outcome["kind"]]
    return Counter(found.values()), [name for name, kind in found.items() if kind == "failed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["tests"])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder in which pytest runs")
    parser.add_argument("--mark", default="gpu")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 12))
    parser.add_argument("--seconds", type=float, default=150, help="for everything, collection included")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_tests", help="folder of logs")
    arguments = parser.parse_args()
    begin = time.monotonic()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.log"):
        old.unlink()
    names = collect(arguments.root, arguments.mark, arguments.paths)
    parts = shares(names, arguments.jobs)
    running = [start(arguments.root, share, number, out) for number, share in enumerate(parts)]
    try:
        in_time = wait(running, arguments.seconds - (time.monotonic() - begin))
    except BaseException:  # an interrupt reaches this process alone
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        raise
    counts, failed = results(out, len(parts))
    for name in failed:
        print("FAILED", name)
    missing = len(names) - sum(counts.values())
    print(
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped, {missing} of {len(names)} "
        f"not run{'' if in_time else ': time was up'}; {len(parts)} processes, {time.monotonic() - begin:.0f} s"
    )
    return 0 if not failed and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
