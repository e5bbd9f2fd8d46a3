"""The training step against Hugging Face's models, eager and compiled: tokens/s, peak memory, and where the step goes.

    python benchmarks/train_step.py [--device cpu|cuda] [--repeats 3] [--only NAME,...] [--no-profile]

Shapes   cpu   GPT-2 124M and a Llama-style model of its size, 4 sequences of 512 tokens
         cuda  GPT-2 124M, 16 sequences of 1024; Llama-style 1.3B, 8 sequences of 2048
Step     random tokens, forward, loss, backward, clipping by the global norm at 1.0, AdamW

    megapre            bf16 weights, fp32 master weights, moments and gradients: what `megapre train` runs
    megapre-compile    the same with run.compile=true
    hf-bf16            bf16 weights and bf16 AdamW states: less precise and less work than megapre's
    hf-bf16-compile    the same through torch.compile
    hf-autocast        fp32 weights under bf16 autocast: the precision that megapre's master weights give

Peers use torch.optim.AdamW(fused=True), torch.nn.utils.clip_grad_norm_ and SDPA, as their users would. Every
measurement is a process of its own, and repeats are interleaved, so that a machine that slows down slows everybody
down. Rows whose provider is not importable are left out. Memory is the peak of the process less what it held before the
model was built. "core s" is the processor time of a step, summed over cores: on a CPU it tells who does less work even
where other processes disturb the clock.

Prints a table and writes it to benchmarks/results/train_step_<hardware>_<date>.{json,md}.
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
import time
from collections.abc import Callable
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
# (shape, sequences, tokens in each), and how many steps are run before and for the timing.
SETTINGS = {
    "cpu": {"cases": [("gpt2-124m", 4, 512), ("llama-124m", 4, 512)], "warmup": 1, "steps": 4},
    "cuda": {"cases": [("gpt2-124m", 16, 1024), ("llama-1.3b", 8, 2048)], "warmup": 5, "steps": 20},
}
PROVIDERS = ("megapre", "megapre-compile", "hf-bf16", "hf-bf16-compile", "hf-autocast")
COMPILE_WARMUP = 2  # more steps for what is compiled: the first compiles, the second may specialise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="providers, separated by commas")
    parser.add_argument("--case", default="", help="one shape only")
    parser.add_argument("--no-profile", action="store_true", help="do not measure where the step goes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing more is started")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + arguments.budget
    if arguments.worker:
        print("RESULT " + json.dumps(work(json.loads(arguments.worker))))
        return
    providers = [p for p in PROVIDERS if not arguments.only or p in arguments.only.split(",")]
    cases = [case for case in SETTINGS[arguments.device]["cases"] if arguments.case in ("", case[0])]
    rows, profiles = measure(providers, cases, arguments)
    print("\n".join(write(rows, profiles, arguments)))


def write(rows: list[Row], profiles: list[Row], arguments: argparse.Namespace) -> list[str]:
    """The results as files, and the lines of the table. Called after every measurement: a run cut off keeps its own."""
    name, lines = table(rows, profiles, arguments)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (out / f"{name}.json").write_text(json.dumps({"rows": rows, "profiles": profiles, "about": about()}, indent=1))
    return [*lines, f"written to {out / name}.{{md,json}}"]


def measure(providers: list[str], cases: list[Any], arguments: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """A row for each case and provider that runs here, from interleaved repeats; profiles of megapre's step."""
    found: dict[tuple[str, str], list[Row]] = {}
    failed: set[tuple[str, str]] = set()
    for repeat in range(arguments.repeats):
        for case, sequences, length in cases:
            for provider in providers:
                if (case, provider) in failed:
                    continue
                task = {"case": case, "sequences": sequences, "length": length, "provider": provider}
                row = run_worker({**task, "device": arguments.device, "profile": False}, arguments.deadline)
                if row is None:
                    failed.add((case, provider))
                    continue
                print(
                    f"[{repeat + 1}/{arguments.repeats}] {case} {provider}: {row['tokens_per_s']:,.0f} tok/s",
                    flush=True,
                )
                found.setdefault((case, provider), []).append(row)
                write([combined(repeats) for repeats in found.values()], [], arguments)
    rows = [combined(repeats) for repeats in found.values()]
    profiles = []
    for case, sequences, length in [] if arguments.no_profile else cases:
        task = {"case": case, "sequences": sequences, "length": length, "provider": "megapre"}
        row = run_worker({**task, "device": arguments.device, "profile": True}, arguments.deadline)
        if row is not None:
            profiles.append({"case": case, "ms": row["profile"]})
    return rows, profiles


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
    """The row of a case and provider: percentiles over the steps of all repeats."""
    times = sorted(t for row in repeats for t in row["times"])
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    tokens = repeats[0]["tokens"]
    return {
        **{key: repeats[0][key] for key in ("case", "provider", "parameters", "flops_per_token", "peak_flops")},
        "p20_ms": cuts[1] * 1e3,
        "p50_ms": cuts[4] * 1e3,
        "p80_ms": cuts[7] * 1e3,
        "tokens_per_s": tokens / cuts[4],
        "core_s": statistics.median(row["core_s"] for row in repeats),
        "memory_bytes": statistics.median(row["memory_bytes"] for row in repeats),
        "repeats": len(repeats),
    }


# What follows runs in a worker.


def work(task: Row) -> Row:
    """Builds the provider's step and times it. Imports torch and the provider here, in the worker alone."""
    import torch

    from megapre.train import machine

    device = torch.device(task["device"])
    torch.manual_seed(0)
    settings = SETTINGS[task["device"]]
    provider = task["provider"]
    step, parameters, profile = (megapre_step if provider.startswith("megapre") else hugging_face_step)(task, device)
    generator = torch.Generator().manual_seed(1)
    shape = (task["sequences"], task["length"] + 1)
    vocab = SHAPES[task["case"]]["vocab"]

    def tokens() -> torch.Tensor:
        return torch.randint(vocab, shape, generator=generator)

    warmup = settings["warmup"] + (COMPILE_WARMUP if "compile" in provider else 0)
    for _ in range(warmup):
        step(tokens())
    if task["profile"]:
        return {"profile": profile(tokens)}
    marks = []
    cores = time.process_time()
    for _ in range(settings["steps"]):
        line = tokens()
        begin = machine.now(device)
        step(line)
        marks.append((begin, machine.now(device)))
    cores = (time.process_time() - cores) / settings["steps"]
    times = [machine.seconds(*mark) for mark in marks]
    count = task["sequences"] * task["length"]
    return {
        **{key: task[key] for key in ("case", "provider")},
        "times": times,
        "core_s": cores,
        "tokens": count,
        "tokens_per_s": count / statistics.median(times),
        "memory_bytes": machine.peak_memory(device) - step.before,
        "parameters": parameters,
        **flops(task, device),
    }


def config(task: Row) -> Any:
    from megapre.config import Config

    return Config.model_validate(
        {
            "name": task["case"],
            "model": {**SHAPES[task["case"]], "context": task["length"], "tied": True},
            "batch": {"micro": task["sequences"], "global": task["sequences"], "seq_length": task["length"]},
            "optim": {"lr": 3e-4, "clip": 1.0},
            "run": {
                "steps": 1000,
                "dtype": "bf16",
                "device": task["device"],
                "compile": task["provider"] == "megapre-compile",
            },
        }
    )


def flops(task: Row, device: Any) -> Row:
    from megapre import plan
    from megapre.train import machine

    known = plan.find(machine.describe(device))
    per_token = plan.per_token(config(task).model, task["length"])
    return {"flops_per_token": per_token, "peak_flops": known.peak("bf16") if known else None}


class Step:
    """A training step as a call on [B, S + 1] tokens; `before` is the peak memory before its model was built."""

    def __init__(self, before: int, call: Callable[[Any], None]) -> None:
        self.before, self.call = before, call

    def __call__(self, line: Any) -> None:
        self.call(line)


def megapre_step(task: Row, device: Any) -> tuple[Step, int, Callable[..., Row]]:
    from megapre import plan
    from megapre.data import GlobalBatch, MicroBatch
    from megapre.train import machine
    from megapre.train.step import Engine

    cfg = config(task)
    device = machine.prepare(cfg.run)
    before = machine.peak_memory(device)
    engine = Engine(cfg, device)

    def step(line: Any) -> None:
        part = MicroBatch(line[:, :-1].contiguous(), line[:, 1:].contiguous(), None, None)
        engine.step(GlobalBatch((part,), part.labels.numel(), cfg.batch.global_), cfg.optim.lr)

    parameters = sum(plan.count(cfg.model))
    return Step(before, step), parameters, lambda tokens: where_it_goes(engine, step, tokens)


def hugging_face_step(task: Row, device: Any) -> tuple[Step, int, Callable[..., Row]]:
    import torch
    import transformers

    from megapre.train import machine

    shape = SHAPES[task["case"]]
    if shape["family"] == "gpt2":
        settings = transformers.GPT2Config(
            vocab_size=shape["vocab"],
            n_positions=task["length"],
            n_embd=shape["hidden"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            **{f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")},
            use_cache=False,
        )
    else:
        settings = transformers.LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["hidden"],
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            max_position_embeddings=task["length"],
            tie_word_embeddings=True,
            use_cache=False,
        )
    device = machine.prepare(config(task).run)  # the allocator's settings too: all providers run under the same
    before = machine.peak_memory(device)
    autocast = task["provider"] == "hf-autocast"
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    model = model.to(device, torch.float32 if autocast else torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if "compile" in task["provider"] else model

    def step(line: Any) -> None:
        line = line.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        # The model shifts labels by itself: T - 1 tokens are predicted, T are counted.
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=line[:, :-1], labels=line[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Step(before, step), sum(p.numel() for p in model.parameters()), lambda tokens: {}


# Which part of a step an operation belongs to, by its own name or that of one it was called from; the first hit counts.
PARTS = (
    ("optimizer", ("optimizer", "adamw")),
    ("loss", ("cross_entropy", "crossentropy")),
    ("attention", ("scaled_dot_product", "scaleddotproduct", "attention")),
    ("norms", ("layer_norm", "layernorm", "rms_norm", "rmsnorm", "_norm_backward")),
    ("products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn")),
)


def where_it_goes(engine: Any, step: Callable[[Any], None], tokens: Callable[[], Any]) -> Row:
    """Milliseconds of one step by part, from torch's profiler: on CUDA the time of kernels, else of operators."""
    import dataclasses

    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    update, norm = engine.optimizer.step, engine.ops.grad_norm

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function("optimizer"):
                return function(*args, **kwargs)

        return call

    engine.optimizer.step = named(update)
    engine.ops = dataclasses.replace(engine.ops, grad_norm=named(norm))
    cuda = engine.device.type == "cuda"
    lines = [tokens() for _ in range(3)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        for line in lines:
            step(line)
        if cuda:
            torch.cuda.synchronize()
        whole = (time.perf_counter() - begin) / len(lines)
    spent = dict.fromkeys([name for name, _ in PARTS] + ["rest"], 0.0)
    for event in profiler.events():
        micro = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[part_of(event)] += micro / 1e3 / len(lines)
    if not cuda:  # what the profiler does not see (Python, autograd's own work) is rest
        spent["rest"] += max(whole * 1e3 - sum(spent.values()), 0.0)
    return spent


def part_of(event: Any) -> str:
    lineage = []
    while event is not None:
        lineage.append(event.name.lower())
        event = event.cpu_parent
    for part, words in PARTS:
        if any(word in name for name in lineage for word in words):
            return part
    return "rest"


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


def hardware(device: str) -> str:
    """The device in a word: part of the result's name."""
    import torch

    from megapre.train import machine

    word = re.sub(r"[^a-z0-9]+", "-", machine.describe(torch.device(device)).lower()).strip("-")
    return word if device == "cuda" else f"{word}-{len(os.sched_getaffinity(0))}core"


def table(rows: list[Row], profiles: list[Row], arguments: argparse.Namespace) -> tuple[str, list[str]]:
    where = hardware(arguments.device)
    name = f"train_step_{where}_{datetime.date.today().isoformat()}"
    facts = ", ".join(f"{key} {value}" for key, value in about().items())
    lines = [f"# Training step on {where}", "", f"`python {' '.join(sys.argv)}`: {facts}", ""]
    cases = {case: f"{n} x {length} tokens" for case, n, length in SETTINGS[arguments.device]["cases"]}
    for case in dict.fromkeys(row["case"] for row in rows):
        these = [row for row in rows if row["case"] == case]
        base = next((row["tokens_per_s"] for row in these if row["provider"] == "hf-bf16"), None)
        lines += [f"## {case}, {cases[case]}, {these[0]['parameters'] / 1e6:.0f}M parameters", ""]
        lines += [
            "| provider | p50 ms | p20 | p80 | core s | tok/s | mfu | x hf-bf16 | memory GiB |",
            "|---|" + "---:|" * 8,
        ]
        for row in these:
            peak = row["peak_flops"]
            mfu = f"{row['tokens_per_s'] * row['flops_per_token'] / peak:.1%}" if peak else "n/a"
            times = f"{row['p50_ms']:.1f} | {row['p20_ms']:.1f} | {row['p80_ms']:.1f} | {row['core_s']:.2f}"
            ratio = f"{row['tokens_per_s'] / base:.2f}" if base else "n/a"
            memory = f"{row['memory_bytes'] / 2**30:.2f}"
            lines.append(f"| {row['provider']} | {times} | {row['tokens_per_s']:,.0f} | {mfu} | {ratio} | {memory} |")
        lines.append("")
    if profiles:
        parts = list(profiles[0]["ms"])
        lines += ["## Where megapre's step goes (ms, and share)", "", "| case | " + " | ".join(parts) + " |"]
        lines.append("|---|" + "---:|" * len(parts))
        for entry in profiles:
            whole = sum(entry["ms"].values())
            cells = [f"{ms:.1f} ({ms / whole:.0%})" for ms in entry["ms"].values()]
            lines.append(f"| {entry['case']} | " + " | ".join(cells) + " |")
        lines.append("")
    return name, lines


if __name__ == "__main__":
    main()
