"""The pipeline's executor against torch.distributed.pipelining: same stages, same ranks, same order of actions.

    python benchmarks/pipeline.py [--ranks 2] [--rounds 7] [--only sleep,compute,alone] [--out benchmarks/results]

    sleep    8 ranks whose stages sleep for their cost: what a schedule loses, however few cores there are. Even stages,
             and uneven ones (the last has the head). Bubble: the time of a step over the work of its busiest rank, less
             one; beside it the simulation's.
    compute  linear layers on --ranks ranks of one thread each: what the executor costs where cores are busy. There
             should be as many cores as ranks.
    alone    one rank. The executor against a loop of forward and backward, where each takes a few milliseconds; and
             `Engine.step` against a loop over the same model, torch.nn.utils.clip_grad_norm_ and fused AdamW, in fp32.

Peers are Schedule1F1B and ScheduleInterleaved1F1B, this also with defer_pp_recv, by which it posts receives later. All
use gloo. Providers take turns, round by round, after a step each that does not count; a step lasts from a barrier to
the end of its last rank. Gradients of the first step are compared. Goals: no step slower than torch's, bubbles not
larger, and at one rank less than 2% over the loop.

Prints a table and writes it to OUT/pipeline_<hardware>_<date>.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from train_step import RESULTS, about, hardware, typed

from megapre.mesh import Mesh
from megapre.parallel.comm import connect
from megapre.parallel.pipeline import Executor
from megapre.parallel.pipes import Pipes
from megapre.schedule import Costs, Schedule, build, simulate

Row = dict[str, Any]
Call = Callable[[], None]
CPU = torch.device("cpu")
UNIT = 0.04
"""Seconds that the forward of a rank's share of sleeping stages takes; a backward takes twice as long."""
SLEEPERS, MICRO_BATCHES = 8, 8
ROWS, WIDTH, DEPTH = 128, 512, 8  # of the stages that compute; DEPTH layers a rank
NOISE = 0.01  # a step that is slower by no more counts as not slower
GOAL = 0.02  # over a loop, at one rank


class Asleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:  # type: ignore[override]
        ctx.seconds = seconds
        ctx.save_for_backward(x, weight)
        time.sleep(seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        time.sleep(2 * ctx.seconds)
        return grad * weight, (grad * x).sum(0), None


class Sleeper(nn.Module):
    def __init__(self, seconds: float, width: int) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return Asleep.apply(x, self.weight, self.seconds)


def computing(layers: int, width: int) -> nn.Module:
    made = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*made)


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


class Chunk:
    """A module as a chunk of the executor."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None) -> None:
        self.module, self.inputs, self.targets = module, inputs, targets
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        if self.inputs is not None:
            x = self.inputs[micro_batch]
        else:
            assert x is not None
            x = x.detach().requires_grad_()
        y = self.module(x)
        if self.targets is not None:
            y = loss_of(y, self.targets[micro_batch])
        self.kept[micro_batch] = x, y
        return y

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        x, y = self.kept.pop(micro_batch)
        y.backward(grad)
        return x.grad


def on_rank(rank: int, ranks: int, store: str, case: Row, rounds: int, answer: str) -> None:
    """All providers of a case, in turns; rank 0 writes the seconds of each round, by provider."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    times: dict[str, list[float]] = {}
    providers = of_case(rank, case)
    gradients = {}
    for name, (modules, call) in providers.items():
        call()  # torch agrees on shapes
        for module in modules:
            module.zero_grad()
        call()
        gradients[name] = [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]
    for name in providers:
        for ours, theirs in zip(gradients["megapre"], gradients[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for _ in range(rounds):
        for name, (_, call) in providers.items():
            dist.barrier()
            begin = time.perf_counter()
            call()
            took = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            times.setdefault(name, []).append(took.item())
    if rank == 0:
        Path(answer).write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def of_case(rank: int, case: Row) -> dict[str, tuple[list[nn.Module], Call]]:
    """By name, the modules of a provider on this rank, and its step."""
    schedule = schedule_of(case)
    last = schedule.stages - 1
    stages = [schedule.stage_of(rank, chunk) for chunk in range(schedule.chunks)]
    generator = torch.Generator().manual_seed(0)
    rows, width, m = case["rows"], case["width"], schedule.micro_batches
    x, target = (torch.randn(m * rows, width, generator=generator) for _ in range(2))

    def modules() -> list[nn.Module]:
        torch.manual_seed(rank)
        if case["seconds"]:
            return [Sleeper(case["seconds"][stage], width) for stage in stages]
        return [computing(DEPTH // schedule.chunks, width) for _ in stages]

    def ours() -> tuple[list[nn.Module], Call]:
        groups = connect(Mesh(schedule.ranks, pp=schedule.ranks), rank, CPU, wrap=True)
        made = modules()
        chunks = [
            Chunk(module, x.chunk(m) if stage == 0 else None, target.chunk(m) if stage == last else None)
            for module, stage in zip(made, stages, strict=True)
        ]
        return made, Executor(schedule, chunks, Pipes(groups, (rows, width), torch.float32, 300.0)).run

    def theirs(**options: Any) -> tuple[list[nn.Module], Call]:
        made = modules()
        parts = [PipelineStage(part, stage, last + 1, CPU) for part, stage in zip(made, stages, strict=True)]
        runner: Any
        if schedule.chunks == 1:
            runner = Schedule1F1B(parts[0], m, loss_fn=loss_of, scale_grads=False)
        else:
            runner = ScheduleInterleaved1F1B(list(parts), m, loss_fn=loss_of, scale_grads=False, **options)

        def step() -> None:
            inputs = (x,) if 0 in stages else ()
            runner.step(*inputs, **({"target": target, "losses": []} if last in stages else {}))

        return made, step

    found = {"megapre": ours(), "torch": theirs()}
    if schedule.chunks > 1:
        found["torch, deferred"] = theirs(defer_pp_recv=True)
    return found


def schedule_of(case: Row) -> Schedule:
    return build(case["schedule"], case["ranks"], 2 if case["schedule"] == "interleaved" else 1, case["micro_batches"])


def sleeping(name: str, even: bool) -> Row:
    case = {"schedule": name, "ranks": SLEEPERS, "micro_batches": MICRO_BATCHES, "rows": 1, "width": 64}
    stages = schedule_of(case).stages
    shares = [1.0] * stages if even else [1.0, *[1.2, 0.9] * (stages // 2 - 1), 1.6]
    seconds = [UNIT * SLEEPERS * share / sum(shares) for share in shares]
    return {**case, "kind": "sleep", "name": f"{name}, {'even' if even else 'uneven'}", "seconds": seconds}


def computed(name: str, ranks: int) -> Row:
    case = {"schedule": name, "ranks": ranks, "micro_batches": 4 * ranks, "rows": ROWS, "width": WIDTH}
    return {**case, "kind": "compute", "name": name, "seconds": None}


def measured(case: Row, rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        task = (case["ranks"], str(Path(folder) / "store"), case, rounds, str(answer))
        mp.start_processes(on_rank, task, case["ranks"], daemon=True, start_method="forkserver")
        times = json.loads(answer.read_text())
    print(case["kind"], case["name"], {name: round(min(all_), 4) for name, all_ in times.items()}, file=sys.stderr)
    row = {**case, "times": times}
    if case["seconds"]:
        costs = Costs.of(len(case["seconds"]), case["seconds"], case["seconds"], case["seconds"])
        timeline = simulate(schedule_of(case), costs)
        row |= {"work": max(timeline.work), "simulated": timeline.makespan}
    return row


def alone(rounds: int) -> list[Row]:
    """One rank: the executor, and the engine, against loops."""
    torch.set_num_threads(1)
    rows = []
    for name, calls in (("executor", of_executor()), ("Engine.step", of_engine())):
        times: dict[str, list[float]] = {}
        for round_ in range(-1, 3 * rounds):
            for provider, call in calls.items():
                begin = time.perf_counter()
                call()
                if round_ >= 0:
                    times.setdefault(provider, []).append(time.perf_counter() - begin)
        rows.append({"kind": "alone", "name": name, "times": times})
    return rows


def of_executor() -> dict[str, Call]:
    m = 16
    module = computing(2, 512)
    inputs, targets = (torch.randn(m * 64, 512).chunk(m) for _ in range(2))
    executor = Executor(build("1f1b", 1, 1, m), [Chunk(module, inputs, targets)])

    def loop() -> None:
        for x, target in zip(inputs, targets, strict=True):
            loss_of(module(x), target).backward()

    return {"megapre": executor.run, "loop": loop}


def of_engine() -> dict[str, Call]:
    from megapre.config import Config
    from megapre.data import GlobalBatch, MicroBatch
    from megapre.train.stage import build_model
    from megapre.train.step import Engine

    m, length, vocab = 4, 128, 2048
    cfg = Config.model_validate(
        {
            "name": "alone",
            "model": {"family": "gpt2", "layers": 4, "hidden": 256, "heads": 4, "vocab": vocab, "context": length},
            "batch": {"micro": 2, "global": 2 * m, "seq_length": length},
            "optim": {"lr": 1e-4, "clip": 1.0},
            "run": {"steps": 1000, "dtype": "fp32", "device": "cpu"},
        }
    )
    tokens = torch.randint(vocab, (m, 2, length + 1))
    parts = tuple(MicroBatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), None, None) for t in tokens)
    batch = GlobalBatch(parts, m * 2 * length, m * 2)
    engine = Engine(cfg, CPU)
    model = build_model(cfg, CPU)
    with torch.no_grad():
        for p, same in zip(model.parameters(), engine.model.parameters(), strict=True):
            p.copy_(same)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scale = torch.tensor(1.0 / batch.valid_tokens)

    def loop() -> None:
        for part in parts:
            model.loss(part.tokens, part.labels, upstream=scale).backward(scale)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def step() -> None:
        engine.step(batch, 1e-4)

    return {"megapre": step, "loop": loop}


def lines_of(rows: list[Row]) -> list[str]:
    """A table for each kind of case. Minimum of the rounds, and median in brackets, in milliseconds."""
    lines: list[str] = []
    for kind, peer in (("sleep", "torch"), ("compute", "torch"), ("alone", "loop")):
        found = [row for row in rows if row["kind"] == kind]
        if not found:
            continue
        names = list(dict.fromkeys(name for row in found for name in row["times"]))
        lines += [f"## {kind}", "", f"| case | {' | '.join(f'{name}, ms' for name in names)} |  | goal |"]
        lines += ["|---|" + "--:|" * (len(names) + 1) + "---|"]
        for row in found:
            least = {name: min(times) for name, times in row["times"].items()}
            cells = [
                f"{least[name] * 1e3:.2f} ({statistics.median(row['times'][name]) * 1e3:.2f})" if name in least else ""
                for name in names
            ]
            best = min(seconds for name, seconds in least.items() if name.startswith(peer))
            over = least["megapre"] / best - 1
            about_it = f"{over:+.1%}"
            if kind == "sleep":
                bubbles = [f"{name} {seconds / row['work'] - 1:.3f}" for name, seconds in least.items()]
                about_it += f"; bubbles {', '.join(bubbles)}, simulated {row['simulated'] / row['work'] - 1:.3f}"
            met = over <= (GOAL if kind == "alone" else NOISE)
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {about_it} | {'met' if met else 'missed'} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="sleep,compute,alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    multiprocessing.set_forkserver_preload(["torch.distributed.pipelining", "torch._dynamo", "megapre.parallel.pipes"])
    kinds = arguments.only.split(",")
    cases = [sleeping(name, even) for name in ("1f1b", "interleaved") for even in (True, False) if "sleep" in kinds]
    cases += [computed(name, arguments.ranks) for name in ("1f1b", "interleaved") if "compute" in kinds]
    rows = [measured(case, 3 if case["seconds"] else arguments.rounds) for case in cases]
    rows += alone(arguments.rounds) if "alone" in kinds else []
    where = hardware("cpu")
    lines = [f"# Pipeline on {where}", "", f"`{typed()}`: {about()}", "", *lines_of(rows)]
    print("\n".join(lines))
    arguments.out.mkdir(exist_ok=True)
    name = f"pipeline_{where}_{datetime.date.today().isoformat()}"
    (arguments.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (arguments.out / f"{name}.json").write_text(json.dumps({"rows": rows, "about": about()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
