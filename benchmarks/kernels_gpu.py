"""The Triton kernels against their peers on one GPU: time, bandwidth or FLOP rate, and per cent of a measured ceiling.

    python benchmarks/kernels_gpu.py [--ops rms_norm,attention] [--quick] [--budget SECONDS] [--out DIR] [--tune]

Ceilings are measured first: a device-to-device copy of 4 GiB (bytes read and written) and an 8192^3 bf16 product on
random data. Every provider's result is compared with fp32 or fp64 before it is timed (`error`: ||got - exact|| /
||exact||, the largest over outputs and gradients); one that is off is reported and not timed. A time is the median of
single calls between CUDA events, each after the L2 cache has been overwritten; the GPU is kept busy while a call is
enqueued, so what Python costs is not in it. p20 and p80 stand beside it. A provider that fails is a row with its
error. What is done when the budget runs out is skipped; what was measured is on disk after every case:

    <out>/kernels_<hardware>_<date>.{json,md,png}

--tune times other launch policies of attention, cross-entropy and the norms' backward instead, and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402

L2_BYTES = 1 << 28
COMPILE_SHARE = 0.4  # of the budget, for providers that torch.compile makes


@dataclass
class Row:
    """One provider of one op at one size in one mode."""

    op: str
    size: str
    mode: str
    provider: str
    p20_ms: float = 0.0
    p50_ms: float = 0.0
    p80_ms: float = 0.0
    gb_s: float = 0.0
    tflop_s: float = 0.0
    of_ceiling: float = 0.0
    error: float = 0.0
    peak_mib: float = 0.0
    note: str = ""


class Bench:
    """Times calls on an otherwise idle GPU; holds the ceilings and the rows."""

    def __init__(self, budget: float) -> None:
        self.started = time.monotonic()
        self.budget = budget
        self.compile_spent = 0.0
        self.rows: list[Row] = []
        self.flush = torch.empty(L2_BYTES // 4, dtype=torch.int32, device="cuda")
        self.ceilings = {"copy": 0.0, "product": 0.0}

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def times(
        self, call: Callable[[], Any], prepare: Callable[[], None] | None = None, spend: float = 0.08
    ) -> list[float]:
        """Milliseconds of single calls, for about `spend` seconds but at least 5 and at most 60 of them."""
        for _ in range(2):
            if prepare:
                prepare()
            call()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        if prepare:
            prepare()
        call()
        enqueued = time.perf_counter() - begun
        torch.cuda.synchronize()
        asleep = int(max(2e-4, 3 * enqueued) * 2e9)  # cycles in which the host can enqueue the call
        count = int(min(max(spend / (time.perf_counter() - begun + 4e-4), 5), 60))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, stop in events:
            if prepare:
                prepare()
            self.flush.zero_()
            torch.cuda._sleep(asleep)
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(stop) for start, stop in events)

    def measure_ceilings(self) -> None:
        source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
        target = torch.empty_like(source)
        self.ceilings["copy"] = 2 * source.nbytes / statistics.median(self.times(lambda: target.copy_(source))) / 1e6
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.ceilings["product"] = 2 * 8192**3 / statistics.median(self.times(lambda: a @ b, spend=0.2)) / 1e9
        print(f"ceilings: copy {self.ceilings['copy']:.0f} GB/s, product {self.ceilings['product']:.0f} TFLOP/s")

    def case(self, build: Callable[[], Any], op: str) -> None:
        """Every provider of one case in every mode."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        try:
            case = build()
            exact = case.exact() if case.exact else []
            exact = [None if t is None else t.detach() for t in exact]
        except Exception as failure:
            self.rows.append(Row(op, "", "", "", note=brief(failure)))
            print(self.rows[-1])
            return
        for provider, function in case.providers.items():
            compiled = provider in ("compile", "flex")
            if self.left() < 5 or (compiled and self.compile_spent > COMPILE_SHARE * self.budget):
                self.rows.append(Row(case.op, case.size, "", provider, note="skipped: out of budget"))
                continue
            begun = time.monotonic()
            before = len(self.rows)
            try:
                if provider == "compile" and case.leaves:
                    torch._dynamo.reset()
                    function = torch.compile(function, dynamic=False)
                self.provider(case, provider, function, exact)
            except Exception as failure:
                self.rows.append(Row(case.op, case.size, "", provider, note=brief(failure)))
            if compiled:
                self.compile_spent += time.monotonic() - begun
            for row in self.rows[before:]:
                print(line(row), flush=True)

    def provider(self, case: Any, provider: str, function: Callable[..., Any], exact: list[Any]) -> None:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        modes: dict[str, Callable[[], Any]] = {}
        if case.leaves:
            leaves = [t.detach().requires_grad_() for t in case.leaves]
            out = function(*leaves)
            grads = torch.autograd.grad(out, leaves, case.upstream)
            results = [out.detach(), *grads]
            kept = None if "full" in case.work else function(*leaves)

            def forward() -> None:
                function(*leaves)

            def backward() -> None:
                torch.autograd.grad(kept, leaves, case.upstream, retain_graph=True)

            def full() -> None:
                torch.autograd.grad(function(*leaves), leaves, case.upstream)

            modes = {"forward": forward, "backward": backward, "full": full}
        else:
            if case.prepare:
                case.prepare()
            results = list(function())
            modes = {"step": function}
        error = max(
            (distance(got, true) for got, true in zip(case.view(results), exact, strict=True) if true is not None),
            default=float("nan"),
        )
        del results
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
        if exact and not error <= case.tolerance:
            note = f"wrong: error {error:.2e} above {case.tolerance:.0e}; not timed"
            self.rows.append(Row(case.op, case.size, "", provider, error=error, note=note))
            return
        for mode, (flops, moved) in case.work.items():
            times = self.times(modes[mode], case.prepare)
            p20, p50, p80 = (times[int(len(times) * at)] for at in (0.2, 0.5, 0.8))
            row = Row(case.op, case.size, mode, provider, p20, p50, p80, moved / p50 / 1e6, flops / p50 / 1e9)
            rate = row.gb_s if case.ceiling == "copy" else row.tflop_s
            row.of_ceiling = rate / self.ceilings[case.ceiling]
            row.error, row.peak_mib = error, peak
            self.rows.append(row)


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    """||got - exact|| / ||exact||; infinite when got holds NaN, which no maximum may lose."""
    if got.shape != exact.shape:
        return float("inf")
    wide = exact.double()
    error = float((got.double() - wide).norm() / wide.norm().clamp(min=1e-30))
    return float("inf") if math.isnan(error) else error


def brief(failure: BaseException) -> str:
    text = (str(failure).strip().splitlines() or [""])[0]
    return f"{type(failure).__name__}: {text[:140]}"


def line(row: Row) -> str:
    if row.note:
        return f"{row.op:21s} {row.size:34s} {row.mode:8s} {row.provider:16s} {row.note}"
    products = row.op in ("attention", "linear_cross_entropy")
    rate = f"{row.tflop_s:5.0f} TFLOP/s" if products else f"{row.gb_s:6.0f} GB/s"
    return (
        f"{row.op:21s} {row.size:34s} {row.mode:8s} {row.provider:16s} {row.p50_ms:9.4f} ms {rate:>13s} "
        f"{100 * row.of_ceiling:4.0f}%  error {row.error:.0e}"
    )


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    version = "none"
    with contextlib.suppress(ImportError):
        import triton

        version = triton.__version__
    return {
        "gpu": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "torch": torch.__version__,
        "triton": version,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
    }


def write(out: Path, bench: Bench) -> Path:
    """The rows as JSON and as a table; complete after every case."""
    about = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    path = out / f"kernels_{slug}_{datetime.date.today():%Y-%m-%d}"
    out.mkdir(parents=True, exist_ok=True)
    data = {"machine": about, "ceilings": bench.ceilings, "rows": [asdict(row) for row in bench.rows]}
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    lines = [
        f"# Kernels on {about['gpu']}",
        "",
        f"`{about['command']}`, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}",
        "",
        f"Ceilings of this run: copy {bench.ceilings['copy']:.0f} GB/s, bf16 product "
        f"{bench.ceilings['product']:.0f} TFLOP/s.",
        "",
        "| op | size | mode | provider | p50 ms | p20 | p80 | GB/s | TFLOP/s | % ceiling | error | peak MiB | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in bench.rows:
        numbers = (
            f"{row.p50_ms:.4f} | {row.p20_ms:.4f} | {row.p80_ms:.4f} | {row.gb_s:.0f} | {row.tflop_s:.1f} | "
            f"{100 * row.of_ceiling:.0f} | {row.error:.1e} | {row.peak_mib:.0f}"
            if row.p50_ms
            else " | | | | | | | "
        )
        lines.append(f"| {row.op} | {row.size} | {row.mode} | {row.provider} | {numbers} | {row.note} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path


def draw(path: Path, bench: Bench) -> None:
    """Bars of per cent of the ceiling, one group a case and mode. Without matplotlib, nothing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    rows = [row for row in bench.rows if row.p50_ms]
    labels = [f"{row.op} {row.size} {row.mode} · {row.provider}" for row in rows]
    figure, axes = plt.subplots(figsize=(11, 1 + 0.18 * len(rows)))
    colours = ["tab:blue" if row.provider.startswith("triton") else "lightgrey" for row in rows]
    axes.barh(range(len(rows)), [100 * row.of_ceiling for row in rows], color=colours)
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("% of the copy or product rate measured in the same run")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)


def tune(bench: Bench, wanted: set[str]) -> None:
    """Other launch policies of the same kernels, one line each."""
    import kernel_cases

    from megapre.kernels.triton import attention, attention_backward, cross_entropy, norm

    def each(module: Any, name: str, policies: list[Any], case: Any, mode: str) -> None:
        original = getattr(module, name)
        for policy in policies:
            setattr(module, name, lambda *_, policy=policy: policy)
            begun, rows = time.monotonic(), len(bench.rows)
            try:
                bench.provider(case, f"{name} {policy}", next(iter(case.providers.values())), case.known)
            except Exception as failure:
                bench.rows.append(Row(case.op, case.size, mode, f"{name} {policy}", note=brief(failure)))
            for row in bench.rows[rows:]:
                if row.mode == mode or row.note:
                    print(f"{line(row)}  ({time.monotonic() - begun:.0f} s)", flush=True)
            if bench.left() < 5:
                break
        setattr(module, name, original)

    def ready(case: Any) -> Any:
        case.known = case.exact()
        return case

    if "attention" in wanted:
        for head_dim, heads in ((128, 32), (64, 32)):
            case = ready(kernel_cases.attention(2, 4096, heads, 8, head_dim))
            forward = [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)]
            each(attention, "policy", forward, case, "forward")
            keys = [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 3), (32, 128, 4, 3)]
            each(attention_backward, "key_policy", keys, case, "backward")
            queries = [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (64, 128, 8, 2)]
            each(attention_backward, "query_policy", queries, case, "backward")
            del case
    if "cross_entropy" in wanted:
        case = ready(kernel_cases.cross_entropy(8192, 131072))
        policies = [(16384, 8, 32), (32768, 8, 32), (8192, 8, 16), (16384, 8, 16), (8192, 8, 32)]
        each(cross_entropy, "policy", policies, case, "step")
        del case
    if "layer_norm" in wanted or "rms_norm" in wanted:
        case = ready(kernel_cases.rms_norm(8192, 4096))
        policies = [(1, 4096, 8, 2), (1, 4096, 8, 3), (1, 4096, 4, 4), (1, 4096, 16, 1), (1, 4096, 16, 2)]
        each(norm, "backward_policy", policies, case, "backward")
        each(norm, "forward_policy", [(1, 4096, 4), (1, 4096, 8), (1, 4096, 16)], case, "forward")
        case = ready(kernel_cases.layer_norm(1024, 12288))
        each(norm, "backward_policy", [(1, 16384, 16, 1), (1, 16384, 32, 1)], case, "backward")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="only these, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one size an op")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tune", action="store_true", help="other launch policies instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels_gpu: there is no CUDA device", file=sys.stderr)
        return 2
    import kernel_cases
    from torch._functorch import config as functorch

    from megapre import kernels

    functorch.donated_buffer = False  # a compiled backward is timed again and again over one graph
    kernels.choose("cuda")
    bench = Bench(arguments.budget)
    bench.measure_ceilings()
    names = {name for name, _ in kernel_cases.cases(False)}
    wanted = set(filter(None, arguments.ops.split(","))) or names
    if wanted - names:
        print(f"kernels_gpu: no op {', '.join(sorted(wanted - names))}; there are {', '.join(sorted(names))}")
        return 2
    if arguments.tune:
        tune(bench, wanted)
        return 0
    path = write(arguments.out, bench)
    for op, build in kernel_cases.cases(arguments.quick):
        if op in wanted and bench.left() > 5:
            bench.case(build, op)
            write(arguments.out, bench)
    draw(path, bench)
    print(f"\nceilings: copy {bench.ceilings['copy']:.0f} GB/s, product {bench.ceilings['product']:.0f} TFLOP/s")
    for row in bench.rows:
        print(line(row))
    spent = time.monotonic() - bench.started
    print(f"{path}.json, {spent:.0f} s, of them {bench.compile_spent:.0f} s in compiled providers")
    ours = [row for row in bench.rows if row.provider.startswith("triton")]
    return int(any(row.note and not row.note.startswith("skipped") for row in ours))


if __name__ == "__main__":
    sys.exit(main())
