"""The demo, from text to samples: seconds of each of its parts, with plain torch and with megapre's own kernels.

    python benchmarks/demo.py [--repeats 3] [--steps 1000] [--only before,after]

    before   MEGAPRE_NATIVE=0: no C++ op, every kernel in torch's form; threads wait and memory is freed as torch has it
    after    as anybody runs it

Runs examples/demo/run.py as it is, each time in a new folder, and notes when it announces its parts. `--steps` is that
of the training; the demo's own is 1000. Minimum of the repeats, which are interleaved. A step is the median of the
run's own records, the validation loss its last. That the ops agree is proven elsewhere, in tests/train; a thousand
steps let their roundings grow to what another seed would do.

Prints a table and writes it to benchmarks/results/demo_<hardware>_<date>.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_step import RESULTS, ROOT, about, hardware, typed

# What sets GNU OpenMP, torch and glibc back to what they do by themselves.
PLAIN_RUNTIME = {"GOMP_SPINCOUNT": "300000", "THP_MEM_ALLOC_ENABLE": "0"}
MODES = {
    "before": ({"MEGAPRE_NATIVE": "0", **PLAIN_RUNTIME}, ["run.keep_memory=false"]),
    "after": ({}, []),
}
PARTS = {"1/5": "tokenizer", "2/5": "tokens", "3/5": "training", "4/5": "evaluation", "5/5": "samples"}
STEP, LOSS = "step, ms", "validation loss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", default=",".join(MODES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for repeat in range(arguments.repeats):
        for mode in arguments.only.split(","):
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(mode, []).append(demo(Path(folder), *MODES[mode], arguments.steps))
            whole = sum(found[mode][-1][part] for part in PARTS.values())
            print(f"[{repeat + 1}/{arguments.repeats}] {mode}: {whole:.1f} s", flush=True)
    lines = table(found)
    print("\n".join(lines))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"demo_{hardware('cpu')}_{datetime.date.today().isoformat()}"
    (arguments.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (arguments.out / f"{name}.json").write_text(json.dumps({"runs": found, "about": about()}, indent=1))


def demo(folder: Path, environment: dict[str, str], overrides: list[str], steps: int) -> dict[str, float]:
    """Seconds of each part of one demo in an empty `folder`, and what its run says of itself."""
    (folder / "examples").symlink_to(ROOT / "examples")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "examples/demo/run.py", f"run.steps={steps}", *overrides],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    assert process.stdout is not None
    begins: list[tuple[str, float]] = []
    for line in process.stdout:
        if (number := line.partition("  ")[0]) in PARTS:
            begins.append((PARTS[number], time.perf_counter()))
    begins.append(("", time.perf_counter()))
    if process.wait():
        raise SystemExit(f"the demo failed with {environment}: exit code {process.returncode}")
    seconds = {part: end - begin for (part, begin), (_, end) in itertools.pairwise(begins)}
    lines = (folder / "runs/demo/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps_s = [record["step_time_s"] for record in records if "step_time_s" in record]
    losses = [record["valid_loss"] for record in records if "valid_loss" in record]
    return {**seconds, STEP: statistics.median(steps_s) * 1e3, LOSS: losses[-1]}


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Seconds by part and mode, the least of all repeats; the last column: the first mode's over the last's."""
    modes = list(found)
    parts = list(PARTS.values())
    for runs in found.values():
        for run in runs:
            run["all"] = sum(run[part] for part in parts)
    lines = [f"# The demo on {hardware('cpu')}", "", f"`{typed()}`: {about()}", ""]
    lines += [f"| s | {' | '.join(modes)} | {modes[0]} / {modes[-1]} |", "|---|" + "---:|" * (len(modes) + 1)]
    for part in (*parts, "all", STEP, LOSS):
        least = [min(run[part] for run in found[mode]) for mode in modes]
        ratio = f"{least[0] / least[-1]:.2f}" if part != LOSS else ""
        figures = " | ".join(f"{value:.3f}" if part == LOSS else f"{value:.1f}" for value in least)
        lines.append(f"| {part} | {figures} | {ratio} |")
    return lines


if __name__ == "__main__":
    main()
