"""The native CPU kernels against torch eager and against the rate of a copy, all in one run.

    python benchmarks/kernels_cpu.py [--repeats 15] [--threads N] [--only rms_norm,cross_entropy]

Providers of a row take turns, and the minimum of the repeats counts: on a machine that others use too, it is the number
that depends least on them. "of copy" is bytes that the op must move, over its time, over the rate of copying 256 MiB
measured between the rows. Goals: rms_norm at least 8 times torch forward and 15 times backward, cross-entropy forward
and backward in place at least 5 times.

Writes benchmarks/results/kernels_cpu_<hardware>_<date>.{json,md}. MEGAPRE_CPU_LEVEL=avx2 measures another code path.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megapre.kernels import library, native

ROOT = Path(__file__).resolve().parent.parent
EPS = 1e-6
IGNORE = -100
Work = Callable[[], object]


@dataclass
class Case:
    """One op at one size: the bytes it must move, and the two providers. `prepare` is not timed."""

    op: str
    size: str
    dtype: str
    moved: int
    native: Work
    eager: Work
    goal: float | None = None
    prepare: Work = lambda: None


@dataclass
class Row:
    """One line of the table; times in ms, rates in GB/s."""

    op: str
    size: str
    dtype: str
    native_ms: float
    native_median_ms: float
    eager_ms: float
    speedup: float
    gb_s: float
    of_copy: float
    goal: float | None


def rms_norm(rows: int, width: int, dtype: torch.dtype, name: str) -> Iterator[Case]:
    ops = torch.ops.megapre
    x, residual, dy = (torch.randn(rows, width).to(dtype) for _ in range(3))
    weight = torch.randn(width).to(dtype)
    size, tensor = f"{rows}x{width}", x.nbytes
    _, _, rstd = ops.rms_norm(x, weight, EPS, None)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = F.rms_norm(leaves[0], (width,), leaves[1], EPS)
    main = dtype == torch.bfloat16
    yield Case(
        "rms_norm forward", size, name, 2 * tensor,
        lambda: ops.rms_norm(x, weight, EPS, None),
        lambda: F.rms_norm(x, (width,), weight, EPS), 8.0 if main else None,
    )  # fmt: skip
    yield Case(
        "rms_norm + residual forward", size, name, 4 * tensor,
        lambda: ops.rms_norm(x, weight, EPS, residual),
        lambda: F.rms_norm(x + residual, (width,), weight, EPS),
    )  # fmt: skip
    yield Case(
        "rms_norm backward", size, name, 3 * tensor,
        lambda: ops.rms_norm_backward(dy, None, x, weight, rstd),
        lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), 15.0 if main else None,
    )  # fmt: skip


def cross_entropy(rows: int, width: int, vocab: int, dtype: torch.dtype, name: str) -> Iterator[Case]:
    ops = torch.ops.megapre
    fresh = torch.randn(rows, width).mul_(3).to(dtype)
    labels = torch.randint(vocab, (rows,))
    settings = (IGNORE, 0.0, 0.0, vocab)
    logits, leaf = fresh.clone(), fresh.clone().requires_grad_()
    losses, lse = ops.cross_entropy(fresh, labels, *settings)
    kept = F.cross_entropy(leaf, labels, reduction="none")
    upstream, ones = torch.ones_like(kept), torch.ones_like(losses)
    size, tensor = f"{rows}x{width}", fresh.nbytes

    def eager() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(leaf, labels, reduction="none"), leaf, upstream)

    yield Case(
        "cross_entropy forward+backward in place", size, name, 2 * tensor,
        lambda: ops.cross_entropy_(logits, labels, None, *settings), eager,
        5.0 if dtype == torch.bfloat16 else None, prepare=lambda: logits.copy_(fresh),
    )  # fmt: skip
    yield Case(
        "cross_entropy forward", size, name, tensor,
        lambda: ops.cross_entropy(fresh, labels, *settings),
        lambda: F.cross_entropy(fresh, labels, reduction="none"),
    )  # fmt: skip
    yield Case(
        "cross_entropy backward", size, name, 2 * tensor,
        lambda: ops.cross_entropy_backward(ones, fresh, labels, lse, *settings),
        lambda: torch.autograd.grad(kept, leaf, upstream, retain_graph=True),
    )  # fmt: skip


def cases(only: set[str]) -> Iterator[Case]:
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        if not only or "rms_norm" in only:
            yield from rms_norm(2048, 4096, dtype, name)
        if not only or "cross_entropy" in only:
            yield from cross_entropy(1024, 50304, 50257, dtype, name)
    if not only or "cross_entropy" in only:
        yield from cross_entropy(256, 128256, 128256, torch.bfloat16, "bf16")


def milliseconds(work: Work, prepare: Work) -> float:
    prepare()
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def measure(case: Case, repeats: int, copy: Work) -> tuple[Row, float]:
    """The row, with `of_copy` still to be filled in, and the time of the fastest copy between its repeats."""
    for work in (case.native, case.eager, copy):
        milliseconds(work, case.prepare)
    times: dict[str, list[float]] = {"native": [], "eager": [], "copy": []}
    for _ in range(repeats):
        times["native"].append(milliseconds(case.native, case.prepare))
        times["eager"].append(milliseconds(case.eager, lambda: None))
        times["copy"].append(milliseconds(copy, lambda: None))
    best, eager = min(times["native"]), min(times["eager"])
    row = Row(
        case.op, case.size, case.dtype, best, sorted(times["native"])[repeats // 2], eager, eager / best,
        case.moved / best / 1e6, 0.0, case.goal,
    )  # fmt: skip
    return row, min(times["copy"])


def machine() -> dict[str, str | int]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": model[1] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "level": native.cpu_level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| op | size | dtype | native ms (median) | torch eager ms | ratio | GB/s | of copy | goal |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:.0f}x {'met' if row.speedup >= row.goal else 'MISSED'}"
        lines.append(
            f"| {row.op} | {row.size} | {row.dtype} | {row.native_ms:.2f} ({row.native_median_ms:.2f}) "
            f"| {row.eager_ms:.1f} | {row.speedup:.1f}x | {row.gb_s:.1f} | {100 * row.of_copy:.0f}% | {goal} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--only", default="", help="rms_norm, cross_entropy; separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not native.load():
        print(f"kernels_cpu: {native.status()[1]}", file=sys.stderr)
        return 2
    library.register()
    torch.manual_seed(0)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)

    source = torch.ones(2**26)
    target = torch.empty_like(source)
    rows: list[Row] = []
    fastest_copy = float("inf")
    for case in cases(set(filter(None, arguments.only.split(",")))):
        row, copy_ms = measure(case, arguments.repeats, lambda: target.copy_(source))
        rows.append(row)
        fastest_copy = min(fastest_copy, copy_ms)
        print(f"{row.op:40s} {row.size:12s} {row.dtype} {row.native_ms:8.2f} ms {row.speedup:6.1f}x", flush=True)
    ceiling = 2 * source.nbytes / fastest_copy / 1e6
    for row in rows:
        row.of_copy = row.gb_s / ceiling

    word = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)|cpu|@.*", "", str(about["cpu"]).lower())).strip("-")
    stem = f"kernels_cpu_{word}-{len(os.sched_getaffinity(0))}core-{about['level']}_{about['date']}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": about, "copy_gb_s": ceiling, "rows": [asdict(row) for row in rows]}
    (arguments.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = [f"# CPU kernels on {about['cpu']}", "", *(f"- {key}: {value}" for key, value in about.items())]
    text += [f"- copy: {ceiling:.1f} GB/s", "", *table(rows)]
    (arguments.out / f"{stem}.md").write_text("\n".join(text) + "\n")
    print("", f"copy {ceiling:.1f} GB/s", *table(rows), f"written to {arguments.out / stem}.json", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
