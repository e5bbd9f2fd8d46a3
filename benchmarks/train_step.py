"""The training step against its peers: tokens/s, peak memory, the same losses, and where megapre's step goes.

    python benchmarks/train_step.py [--device cpu|cuda] [--repeats 3] [--only NAME,...] [--threads 2] [--no-profile]

Shapes   cpu   GPT-2 124M and a Llama-style model of its size, 4 sequences of 512 tokens
         cuda  GPT-2 124M, 16 sequences of 1024; Llama-style 1.3B, 8 sequences of 2048
Step     forward, loss, backward, clipping by the global norm at 1.0, AdamW
Tokens   log-uniform (frequencies as 1 / rank, Zipf), so that there is something to learn; the same for all

    megapre                  bf16 weights, fp32 master weights, moments and gradients: what `megapre train` runs
    megapre-bf16             bf16 weights, moments and gradients alone, rounded at random
    megapre-bf16-recompute   the same, outputs of norms and activations computed again in the backward
    megapre-compile          megapre with run.compile=true
    megapre-graph            megapre with run.cuda_graph=true, on CUDA
    hf-bf16                  Hugging Face, bf16 weights and bf16 AdamW states: less precise and less work than megapre's
    hf-bf16-compile          the same through torch.compile
    hf-autocast              fp32 weights under bf16 autocast: the precision that megapre's master weights give
    hf-autocast-compile      the same through torch.compile
    hf-bf16-liger            hf-bf16 with Liger's kernels, on CUDA
    hf-autocast-liger        hf-autocast with Liger's kernels, on CUDA
    plain-bf16-compile       a model in the manner of nanoGPT (plain_model.py), compiled, bf16 weights and states
    plain-autocast-compile   the same with fp32 weights under bf16 autocast, as nanoGPT itself trains

Peers use torch.optim.AdamW(fused=True), torch.nn.utils.clip_grad_norm_, SDPA and torch.compile(dynamic=False) in its
default mode, as their users would. All run under the same settings of threads and memory, which are megapre's. Every
measurement is a process of its own, and repeats are interleaved, so that a machine that slows down slows everybody
down. Rows whose provider is not importable are left out. Memory is the peak of the timed steps, without what loading
and compiling took, less what the process held before the model was built, when all it needs was imported. "core s" is
the processor time of a step, summed over cores: on a CPU it tells who does less work even where other processes disturb
the clock.

The same loss curve: all start from the same weights and see the same tokens. megapre's loss may differ from that of a
peer by LOSS_BOUND at any step, and by LOSS_BOUND_BF16 where one of them has bf16 weights alone, whose rounding is the
larger part.

The goal, against the fastest peer: on a CPU 1.6 times its tokens/s in 0.75 times its memory; on a GPU 1.1 times for
GPT-2 and 1.2 times for the Llama-style model, in no more memory; shown against the fastest of megapre's own precision
too. What bounds it: the time of all products of a step, each measured by itself in
the same run (step_bound.py).

Prints a table and writes it to benchmarks/results/train_step_<hardware>_<date>.{json,md}, and as a picture to .png
where matplotlib is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-124m": {"family": "gpt2", "layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "vocab": 50257},
    "llama-124m": {"family": "llama", "layers": 12, "hidden": 768, "heads": 12, "ffn": 2048, "vocab": 50257},
    "llama-1.3b": {"family": "llama", "layers": 24, "hidden": 2048, "heads": 16, "ffn": 5504, "vocab": 32000},
}
# (shape, sequences, tokens in each), and how many steps are run before and for the timing. What is compiled compiles in
# the first; the warm-up is the same for all, so that the losses are those of the same steps.
SETTINGS = {
    "cpu": {"cases": [("gpt2-124m", 4, 512), ("llama-124m", 4, 512)], "warmup": 2, "steps": 4},
    "cuda": {"cases": [("gpt2-124m", 16, 1024), ("llama-1.3b", 8, 2048)], "warmup": 5, "steps": 20},
}
PROVIDERS = (
    "megapre",
    "megapre-bf16",
    "megapre-bf16-recompute",
    "megapre-compile",
    "megapre-graph",
    "hf-bf16",
    "hf-bf16-compile",
    "hf-autocast",
    "hf-autocast-compile",
    "hf-bf16-liger",
    "hf-autocast-liger",
    "plain-bf16-compile",
    "plain-autocast-compile",
)
ON_CUDA = ("megapre-graph", "hf-bf16-liger", "hf-autocast-liger")
# By device and shape: times the tokens/s of the fastest peer, in at most so many times its memory.
GOALS = {
    "cpu": {"gpt2-124m": (1.6, 0.75), "llama-124m": (1.6, 0.75)},
    "cuda": {"gpt2-124m": (1.1, 1.0), "llama-1.3b": (1.2, 1.0)},
}
# Nats, over the 6 steps of a measurement. Peers of one precision were seen 0.0003 and 0.002 from each other.
LOSS_BOUND, LOSS_BOUND_BF16 = 0.003, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="providers, separated by commas")
    parser.add_argument("--case", default="", help="one shape only")
    parser.add_argument("--steps", type=int, default=0, help="timed steps of a measurement")
    parser.add_argument("--threads", type=int, default=0, help="0: as megapre chooses")
    parser.add_argument("--no-profile", action="store_true", help="do not measure where the step goes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing more is started")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + arguments.budget
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for this process, its workers and what they compile
    if arguments.worker:
        print("RESULT " + json.dumps(work(json.loads(arguments.worker))))
        return
    here = [p for p in PROVIDERS if p not in ON_CUDA or arguments.device == "cuda"]
    providers = [p for p in here if not arguments.only or p in arguments.only.split(",")]
    cases = [case for case in SETTINGS[arguments.device]["cases"] if arguments.case in ("", case[0])]
    with tempfile.TemporaryDirectory() as folder:
        rows, products, profiles = measure(providers, cases, arguments, Path(folder))
    print("\n".join(write(rows, products, profiles, arguments)))


def write(rows: list[Row], products: Row, profiles: Row, arguments: argparse.Namespace) -> list[str]:
    """The results as files, and the lines of the table. Called after every measurement: a run cut off keeps its own."""
    name, lines = table(rows, products, profiles, arguments)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (out / f"{name}.json").write_text(
        json.dumps({"rows": rows, "products": products, "profiles": profiles, "about": about()}, indent=1)
    )
    written = ["md", "json"]
    with suppress(ImportError):  # no matplotlib
        from step_picture import draw  # not at the top: what is timed in a worker shall import its own alone

        draw(rows, name.removeprefix("train_step_").rpartition("_")[0], out / f"{name}.png")
        written.append("png")
    return [*lines, f"written to {out / name}.{{{','.join(written)}}}"]


def measure(
    providers: list[str], cases: list[Any], arguments: argparse.Namespace, folder: Path
) -> tuple[list[Row], Row, Row]:
    """From interleaved repeats: a row for each case and provider that runs here, and by case the products of a step.

    Then, by case, the profile of megapre's step.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    bounds: dict[str, list[Row]] = {}
    failed: set[tuple[str, str]] = set()
    tasks: list[Row] = []
    for case, sequences, length in cases:
        shape = {"case": case, "shape": SHAPES[case], "sequences": sequences, "length": length}
        settings = {**SETTINGS[arguments.device], "device": arguments.device}
        settings["steps"] = arguments.steps or settings["steps"]
        tasks.append({**shape, **settings, "cases": [], "weights": str(folder / case), "provider": "megapre"})
        run_worker({**tasks[-1], "do": "weights"}, arguments.deadline)

    def results() -> tuple[list[Row], Row]:
        return [combined(repeats) for repeats in found.values()], {
            case: step_products(repeats) for case, repeats in bounds.items()
        }

    for repeat in range(arguments.repeats):
        for task in tasks:
            for provider in providers:
                key = (task["case"], provider)
                row = None
                if key not in failed:
                    row = run_worker({**task, "provider": provider, "do": "time"}, arguments.deadline)
                if row is None:
                    failed.add(key)
                    continue
                rate = f"{row['tokens_per_s']:,.0f} tok/s, loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
                print(f"[{repeat + 1}/{arguments.repeats}] {task['case']} {provider}: {rate}", flush=True)
                found.setdefault(key, []).append(row)
                write(*results(), {}, arguments)
            if (row := run_worker({**task, "do": "products"}, arguments.deadline)) is not None:
                bounds.setdefault(task["case"], []).append(row)
    profiles = {}
    for task in [] if arguments.no_profile else tasks:
        row = run_worker({**task, "do": "profile"}, arguments.deadline)
        if row is not None:
            profiles[task["case"]] = row["profile"]
    return *results(), profiles


def run_worker(task: Row, deadline: float) -> Row | None:
    """What one process measured; None, and the reason printed, when it could not or the time is up."""
    left = deadline - time.monotonic()
    if left <= 0:
        print(f"{task['case']} {task['provider']}: left out, the budget is spent", flush=True)
        return None
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    limit = None if math.isinf(left) else left + 30  # what has begun may end
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=limit
        )
    except subprocess.TimeoutExpired:
        print(f"{task['case']} {task['provider']}: left out, the budget is spent", flush=True)
        return None
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    reason = done.stderr.strip().splitlines()[-1:] or ["no output"]
    print(f"{task['case']} {task['provider']}: left out, {reason[0]}", flush=True)
    return None


def combined(repeats: list[Row]) -> Row:
    """The row of a case and provider, over the steps of all repeats."""
    times = sorted(t for row in repeats for t in row["times"])
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    kept = ("case", "provider", "tokens", "parameters", "flops_per_token", "peak_flops", "losses")
    return {
        **{key: repeats[0][key] for key in kept},
        "min_ms": times[0] * 1e3,
        "p50_ms": cuts[4] * 1e3,
        "p80_ms": cuts[7] * 1e3,
        "tokens_per_s": repeats[0]["tokens"] / cuts[4],
        "core_s": min(row["core_s"] for row in repeats),
        "memory_bytes": statistics.median(row["memory_bytes"] for row in repeats),
        "repeats": len(repeats),
    }


def step_products(repeats: list[Row]) -> Row:
    """What all repeats tell of the products of a step: the least time of each.

    {"torch": seconds of a step's products, "megapre": the same, "rate": the largest in FLOP/s, "rates": of each}.
    """
    least = {name: [min(row["times"][name][by] for row in repeats) for by in (0, 1)] for name in repeats[0]["times"]}
    of = repeats[0]["products"]
    rates = {name: [of[name]["flops"] / seconds for seconds in both] for name, both in least.items()}
    rate = max(max(both) for both in rates.values())
    scores = repeats[0]["scores_flops"] / rate
    torch_s, ours = (scores + sum(of[name]["count"] * both[by] for name, both in least.items()) for by in (0, 1))
    return {"torch": torch_s, "megapre": ours, "rate": rate, "rates": rates}


# What follows runs in a worker.


def work(task: Row) -> Row:
    """Writes the initial weights, times the provider's step, or profiles megapre's. torch is imported here alone."""
    from megapre.train import cpu_runtime

    cpu_runtime.before_torch(os.environ)
    import step_bound
    import step_parts
    import step_providers
    import torch

    from megapre.train import machine

    torch.manual_seed(0)
    device = torch.device(task["device"])
    if task["do"] == "weights":
        step_providers.save_weights(task, Path(task["weights"]))
        return {}
    if task["do"] == "products":
        return step_bound.measure(task)
    generator = torch.Generator().manual_seed(1)

    def tokens() -> torch.Tensor:
        uniform = torch.rand(task["sequences"], task["length"] + 1, generator=generator, dtype=torch.float64)
        return (task["shape"]["vocab"] ** uniform).long() - 1

    if task["do"] == "profile":
        step = step_providers.of_megapre(task, step_providers.named)
        for _ in range(task["warmup"]):
            step.call(tokens())
        return {"profile": step_parts.where_it_goes(step.call, [tokens() for _ in range(3)], device)}
    step = step_providers.build(task)
    losses = [step.call(tokens()) for _ in range(task["warmup"])]
    marks = []
    step_providers.reset_peak(device)
    cores = time.process_time()
    for _ in range(task["steps"]):
        line = tokens()
        begin = machine.now(device)
        losses.append(step.call(line))
        marks.append((begin, machine.now(device)))
    cores = (time.process_time() - cores) / task["steps"]
    times = [machine.seconds(*mark) for mark in marks]
    count = task["sequences"] * task["length"]
    return {
        **{key: task[key] for key in ("case", "provider")},
        "times": times,
        "core_s": cores,
        "tokens": count,
        "tokens_per_s": count / statistics.median(times),
        "memory_bytes": machine.peak_memory(device) - step.before,
        "parameters": step.parameters,
        "losses": [float(loss) for loss in losses],
        **step_bound.flops(task),
    }


# The table.


def about() -> Row:
    import torch

    versions = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        import transformers

        versions["transformers"] = transformers.__version__
    except ImportError:
        pass
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {**versions, "commit": commit.stdout.strip(), "threads": torch.get_num_threads()}


def typed() -> str:
    """What was typed, but for the folder of the results: that is one machine's."""
    words = iter(sys.argv)
    kept = [word for word in words if word != "--out" or not next(words)]
    return " ".join(["python", *(word for word in kept if not word.startswith("--out="))])


def hardware(device: str) -> str:
    """The device in a word: part of the result's name."""
    import torch

    from megapre.train import machine

    word = re.sub(r"[^a-z0-9]+", "-", machine.describe(torch.device(device)).lower()).strip("-")
    return word if device == "cuda" else f"{word}-{len(os.sched_getaffinity(0))}core"


def table(rows: list[Row], products: Row, profiles: Row, arguments: argparse.Namespace) -> tuple[str, list[str]]:
    where = hardware(arguments.device)
    name = f"train_step_{where}_{datetime.date.today().isoformat()}"
    facts = ", ".join(f"{key} {value}" for key, value in about().items())
    lines = [f"# Training step on {where}", "", f"`{typed()}`: {facts}", ""]
    cases = {case: f"{n} x {length} tokens" for case, n, length in SETTINGS[arguments.device]["cases"]}
    for case in dict.fromkeys(row["case"] for row in rows):
        these = [row for row in rows if row["case"] == case]
        lines += [f"## {case}, {cases[case]}, {these[0]['parameters'] / 1e6:.0f}M parameters", ""]
        lines += [*providers_table(these), ""]
        for sentence in (*goal(these, products.get(case), *GOALS[arguments.device][case]), *same_losses(these)):
            lines += [sentence, ""]
        if case in products:
            lines += [*products_table(products[case]), ""]
        if case in profiles:
            lines += [*parts_table(profiles[case]), ""]
    return name, lines


def fastest_peer(rows: list[Row], kind: str = "") -> Row | None:
    """The fastest of the peers whose name holds `kind`."""
    peers = [row for row in rows if not is_ours(row) and kind in row["provider"]]
    return min(peers, key=lambda row: row["p50_ms"], default=None)


def is_ours(row: Row) -> bool:
    return row["provider"].startswith("megapre")


def providers_table(rows: list[Row]) -> list[str]:
    """Speed, memory and losses; ratios to the fastest peer; the largest distance of any step's loss from megapre's."""
    base, ours = fastest_peer(rows), next((row for row in rows if row["provider"] == "megapre"), None)
    lines = [
        "| provider | min ms | p50 | p80 | core s | tok/s | mfu | x fastest peer | by min | memory GiB | x its memory "
        "| first loss | last loss | furthest from megapre's |",
        "|---|" + "---:|" * 13,
    ]
    for row in rows:
        peak = row["peak_flops"]
        mfu = f"{row['tokens_per_s'] * row['flops_per_token'] / peak:.1%}" if peak else "n/a"
        times = f"{row['min_ms']:.1f} | {row['p50_ms']:.1f} | {row['p80_ms']:.1f} | {row['core_s']:.2f}"
        speed, share = "n/a | n/a", "n/a"
        if base:
            speed = f"{base['p50_ms'] / row['p50_ms']:.2f} | {base['min_ms'] / row['min_ms']:.2f}"
            share = f"{row['memory_bytes'] / base['memory_bytes']:.2f}"
        memory = f"{row['memory_bytes'] / 2**30:.2f}"
        losses = f"{row['losses'][0]:.4f} | {row['losses'][-1]:.4f}"
        apart = f"{furthest(row, ours):.4f}" if ours else "n/a"
        lines.append(
            f"| {row['provider']} | {times} | {row['tokens_per_s']:,.0f} | {mfu} | {speed} | {memory} | {share} "
            f"| {losses} | {apart} |"
        )
    return lines


def furthest(a: Row, b: Row) -> float:
    """The largest distance of the losses of one step."""
    return max(abs(here - there) for here, there in zip(a["losses"], b["losses"], strict=True))


def goal(rows: list[Row], products: Row | None, wanted: float, most: float) -> Iterator[str]:
    """Whether megapre is where it should be, `wanted` times a peer's tokens/s in `most` times its memory, and how far
    it could go."""
    tokens = rows[0]["tokens"]
    if products:
        yield (
            f"The products of a step alone take {products['torch']:.3f} s by torch.mm and {products['megapre']:.3f} s "
            f"by megapre's own: they would allow {tokens / products['torch']:,.0f} and "
            f"{tokens / products['megapre']:,.0f} tok/s."
        )
    for row in filter(is_ours, rows):
        if products:
            share = products["megapre"] * 1e3 / row["p50_ms"]
            yield f"{row['provider']}: its products by themselves take {share:.0%} of the time of its step."
        for kind, bases in (("the fastest peer", ""), ("the fastest peer with fp32 weights", "autocast")):
            if base := fastest_peer(rows, bases):
                speed, memory = base["p50_ms"] / row["p50_ms"], row["memory_bytes"] / base["memory_bytes"]
                yield (
                    f"{row['provider']}: {speed:.2f} times the tok/s of {base['provider']}, {kind} "
                    f"(goal {wanted}: {met(speed >= wanted)}), {memory:.2f} times its memory "
                    f"(goal {most}: {met(memory <= most)})."
                )


def same_losses(rows: list[Row]) -> Iterator[str]:
    """Whether megapre's losses are those of its peers."""
    for ours in filter(is_ours, rows):
        for kind in ("autocast", "bf16"):
            bound = LOSS_BOUND_BF16 if kind == "bf16" or "bf16" in ours["provider"] else LOSS_BOUND
            peers = [row for row in rows if not is_ours(row) and kind in row["provider"]]
            if peers:
                apart = max(furthest(ours, row) for row in peers)
                yield (
                    f"{ours['provider']}: the losses of {len(ours['losses'])} steps are within {apart:.4f} of those of "
                    f"{', '.join(row['provider'] for row in peers)} (bound {bound}: {met(apart <= bound)})."
                )


def met(yes: bool) -> str:
    return "met" if yes else "not met"


def products_table(products: Row) -> list[str]:
    lines = ["| product, GFLOP/s | torch.mm | megapre |", "|---|---:|---:|"]
    return lines + [f"| {name} | {by[0] / 1e9:,.0f} | {by[1] / 1e9:,.0f} |" for name, by in products["rates"].items()]


def parts_table(profile: dict[str, float]) -> list[str]:
    whole = sum(profile.values())
    lines = ["| where megapre's step goes, under the profiler | ms | share |", "|---|---:|---:|"]
    lines += [f"| {part} | {ms:.1f} | {ms / whole:.1%} |" for part, ms in profile.items()]
    return [*lines, f"| all | {whole:.1f} | |"]


if __name__ == "__main__":
    main()
