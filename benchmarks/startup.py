"""How soon something happens: `megapre --help`, and the first step line of a run.

    python benchmarks/startup.py [--repeats 7]

    help        `megapre --help` against `python -c pass`. Goal: at most 5 times. first step  from starting `megapre
    train demo` to its first step line, against `import torch` plus one step of it (the
                median of its first steps behind the first one). Goal: at most 2 times.

The demo recipe runs on made-up tokens. Minimum of the repeats, which are interleaved: start-up is disturbed upwards
only. Prints a table and writes it to benchmarks/results/startup_<hardware>_<date>.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from train_step import RESULTS, ROOT, about, hardware, typed

FEW = 6  # steps of the demo that are waited for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made_up(Path(folder))
        for repeat in range(repeats):
            times.setdefault("pass", []).append(seconds("-c", "pass"))
            times.setdefault("help", []).append(seconds("-m", "megapre", "--help"))
            times.setdefault("import torch", []).append(seconds("-c", "import torch"))
            first, step = first_step(Path(folder), f"run{repeat}")
            times.setdefault("first step line", []).append(first)
            times.setdefault("one step", []).append(step)
    least = {name: min(values) for name, values in times.items()}
    rows = [
        ("`megapre --help`", least["help"], "`python -c pass`", least["pass"], 5),
        (
            "first step line of `megapre train demo`",
            least["first step line"],
            "`import torch` + one step",
            least["import torch"] + least["one step"],
            2,
        ),
    ]
    where = hardware("cpu")
    lines = [f"# Start-up on {where}", "", f"`{typed()}`: {about()}", ""]
    lines += ["| what | s | against | s | ratio | goal |", "|---|---:|---|---:|---:|---:|"]
    for what, value, against, base, goal in rows:
        lines.append(f"| {what} | {value:.3f} | {against} | {base:.3f} | {value / base:.2f} | {goal} |")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    name = f"startup_{where}_{datetime.date.today().isoformat()}"
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps({"times": times, "about": about()}, indent=1))


def command(*arguments: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


def seconds(*arguments: str) -> float:
    begin = time.perf_counter()
    process = command(*arguments)
    process.communicate()
    assert process.returncode == 0, f"{arguments} failed"
    return time.perf_counter() - begin


def made_up(folder: Path) -> None:
    """A dataset of random tokens with the sidecar that names their vocabulary."""
    from megapre.data import IndexedWriter, Sidecar, write_sidecar

    random = np.random.RandomState(0)
    with IndexedWriter(folder / "data", vocab_size=8192) as writer:
        for _ in range(400):
            writer.add_document(random.randint(8192, size=2000))
    write_sidecar(folder / "data", Sidecar("none.json", "0" * 64, 8192, None, False, 400, 800_000, 3_200_000))


def first_step(folder: Path, name: str) -> tuple[float, float]:
    """Seconds until the first step line, and the median of the following steps'."""
    data = [f'data.{part}=["{folder}/data"]' for part in ("train", "valid")]
    overrides = [*data, f"run.dir={folder}", f"name={name}"]
    begin = time.perf_counter()
    process = command("-m", "megapre", "train", "demo", *overrides)
    assert process.stdout is not None
    lines = 0
    first = 0.0
    for line in process.stdout:
        if line.startswith("step"):
            lines += 1
            first = first or time.perf_counter() - begin
            if lines == FEW:
                break
    process.kill()
    process.communicate()
    records = (folder / name / "metrics.jsonl").read_text().splitlines()[1 : FEW - 1]
    return first, statistics.median(json.loads(record)["step_time_s"] for record in records)


if __name__ == "__main__":
    main()
