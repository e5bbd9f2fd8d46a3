"""How much of the exchange between replicas hides behind the computation, on a link of known bandwidth.

    sudo python benchmarks/overlap.py [--rates 400,800,1600] [--rounds 5] [--out benchmarks/results]

Two replicas, a rank and a core each, live in two network namespaces that a pair of virtual cards joins; the kernel
holds each direction to so many Mbit/s (tc, token bucket filter). Needs Linux, root, `ip`, `tc`, `unshare` and
`nsenter`, and two free cores. Nothing of the machine's own network is touched, and the namespaces end with the
processes.

    sharded      Engine.step, layout.shard_optimizer: reduce-scatter in the backward, all-gather in the next forward
    whole        Engine.step without it: all-reduce in the backward
    at the end   the engine of `sharded`, each collective begun when all gradients are there and waited for at once
    DDP          torch.nn.parallel.DistributedDataParallel over the same model and buckets, fused AdamW

all in fp32 over gloo. Providers take turns, round by round; a round is two steps one after the other, from a barrier
to the end of the last rank, since what begins in one step ends in the next. `alone` is the same step without any
exchange and `exchange` the same collectives without the step. Hidden is the share of `exchange` that a step does not
last longer than `alone`: 1 - (step - alone) / exchange. The ceiling is below 1: the sums begin when the first bucket is
complete, nothing hides the last one, and what TCP takes of a core the computation lacks.

Prints a table and writes it to OUT/overlap_<hardware>_<date>.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from train_step import RESULTS, about, hardware, typed

from megapre.config import Config
from megapre.data import GlobalBatch, MicroBatch
from megapre.parallel.comm import Place, join, leave
from megapre.train.stage import build_model
from megapre.train.step import Engine, connected

Call = Callable[[], None]
Row = dict[str, Any]
CPU = torch.device("cpu")
STEPS = 2  # of a round
BUCKET = 1_000_000  # elements: 4 MB
CARD = "wire0"
MTU = 60_000  # bytes of a packet: real cards cut them without the processor
VOCAB, LENGTH, SEQUENCES = 4096, 128, 16


def config(shard: bool) -> Config:
    return Config.model_validate(
        {
            "model": {"family": "gpt2", "layers": 4, "hidden": 320, "heads": 5, "vocab": VOCAB, "context": LENGTH},
            "layout": {"dp": 2, "shard_optimizer": shard, "bucket": BUCKET},
            "batch": {"micro": SEQUENCES, "global": 2 * SEQUENCES, "seq_length": LENGTH},
            "optim": {"lr": 1e-4, "clip": 0.0},
            "run": {"steps": 1000, "dtype": "fp32", "device": "cpu", "threads": 1},
        }
    )


def batch_of(rank: int) -> GlobalBatch:
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(rank))
    part = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, None)
    return GlobalBatch((part,), SEQUENCES * LENGTH, 2 * SEQUENCES)


def engine_of(place: Place, shard: bool) -> Engine:
    cfg = config(shard)
    return Engine(cfg, CPU, connected(cfg, place, CPU))


def providers(place: Place) -> dict[str, Call]:
    """Each makes a step and leaves nothing under way but what the next one waits for."""
    batch = batch_of(place.rank)
    engines = {"sharded": engine_of(place, True), "whole": engine_of(place, False)}

    def step_of(engine: Engine) -> Call:
        return lambda: (engine.step(batch, 1e-4), None)[1]

    found = {name: step_of(engine) for name, engine in engines.items()}
    late, silent = engine_of(place, True), engine_of(place, True)
    assert late.flat.exchange is not None and silent.flat.exchange is not None
    late.flat.exchange.arrived = lambda name: None  # type: ignore[method-assign]
    silent.flat.exchange._sum = lambda part: None  # type: ignore[method-assign]
    silent.flat.exchange.gather = lambda: None  # type: ignore[method-assign]

    def at_the_end() -> None:
        late.step(batch, 1e-4)
        late.settle()

    found["at the end"] = at_the_end
    found["DDP"] = ddp(batch)
    found["alone"] = step_of(silent)
    for shard, name in ((True, "exchange, sharded"), (False, "exchange, whole")):
        exchange = engine_of(place, shard).flat.exchange
        assert exchange is not None

        def exchanged(exchange: Any = exchange) -> None:
            exchange.finish()
            exchange.gather()
            exchange.ready()

        found[name] = exchanged
    return found


def ddp(batch: GlobalBatch) -> Call:
    model = build_model(config(False), CPU)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, part: MicroBatch) -> torch.Tensor:
            return self.model.loss(part.tokens, part.labels, upstream=scale)

    scale = torch.tensor(1.0 / (2 * batch.valid_tokens))
    wrapped = DistributedDataParallel(Loss(), bucket_cap_mb=BUCKET * 4 / 2**20, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        wrapped(batch.micro_batches[0]).backward(scale)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def rank_main(rank: int, rounds: int, answer: str) -> None:
    """One replica: all providers in turns; rank 0 writes the seconds of a step in each round, by provider."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    place = Place(rank, 2, rank, 2)
    join(place, CPU)
    times: dict[str, list[float]] = {}
    calls = providers(place)
    for round_ in range(-1, rounds):
        for name, call in calls.items():
            call()  # what a step of another provider has displaced from the caches, and DDP's new buckets
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(STEPS):
                call()
            dist.barrier()
            if round_ >= 0:
                times.setdefault(name, []).append((time.perf_counter() - begin) / STEPS)
    if rank == 0:
        Path(answer).write_text(json.dumps(times))
    del calls
    leave()


def on_a_link(mbit: int, rounds: int) -> dict[str, list[float]]:
    """The times of all providers on a link of so many Mbit/s in each direction."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        rooms = [subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for _ in range(2)]
        try:
            time.sleep(0.5)  # until both have left for namespaces of their own
            run = subprocess.check_call
            names = [f"mp{os.getpid() % 10000}{end}" for end in "ab"]
            run(["ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]])
            for rank, room in enumerate(rooms):
                inside = ["nsenter", "--net", "--target", str(room.pid)]
                run(["ip", "link", "set", names[rank], "netns", str(room.pid), "name", CARD])
                run([*inside, "ip", "address", "add", f"10.77.0.{rank + 1}/24", "dev", CARD])
                run([*inside, "ip", "link", "set", CARD, "mtu", str(MTU), "up"])
                run([*inside, "ip", "link", "set", "lo", "up"])
                shape = ["rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms"]
                run([*inside, "tc", "qdisc", "add", "dev", CARD, "root", "tbf", *shape])
            environment = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": CARD}
            ranks = [
                subprocess.Popen(
                    [
                        *("nsenter", "--net", "--target", str(room.pid), sys.executable, __file__),
                        *("--rank", str(rank), "--rounds", str(rounds), "--answer", str(answer)),
                    ],
                    env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                )
                for rank, room in enumerate(rooms)
            ]
            if codes := [code for rank in ranks if (code := rank.wait())]:
                sys.exit(f"a rank ended with exit code {codes[0]}")
            return json.loads(answer.read_text())  # type: ignore[no-any-return]
        finally:
            for room in rooms:
                room.kill()


def lines_of(rows: list[Row]) -> list[str]:
    """A table. Medians of the rounds, in milliseconds."""
    lines = ["| link, Mbit/s | alone | exchange | | step | hidden |", "|--:|--:|--:|---|--:|--:|"]
    for row in rows:
        took = {name: statistics.median(times) for name, times in row["times"].items()}
        for name in ("sharded", "whole", "at the end", "DDP"):
            exchange = took["exchange, sharded" if name in ("sharded", "at the end") else "exchange, whole"]
            hidden = 1 - (took[name] - took["alone"]) / exchange
            cells = (took["alone"], exchange, name, took[name])
            text = " | ".join(cell if isinstance(cell, str) else f"{cell * 1e3:.0f}" for cell in cells)
            lines.append(f"| {row['mbit']} | {text} | {hidden:.0%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="400,800,1600", help="Mbit/s in each direction")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return rank_main(arguments.rank, arguments.rounds, arguments.answer)
    if missing := [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]:
        sys.exit(f"overlap: {', '.join(missing)} not found (Debian: iproute2, util-linux)")
    if os.geteuid() != 0:
        sys.exit("overlap: network namespaces and tc need root")
    rows: list[Row] = []
    for rate in map(int, arguments.rates.split(",")):
        rows.append({"mbit": rate, "times": on_a_link(rate, arguments.rounds)})
        print("\n".join(lines_of(rows[-1:])), file=sys.stderr)
    where = hardware("cpu")
    elements = sum(parameter.numel() for parameter in build_model(config(False), CPU).parameters())
    setting = f"{elements:,} parameters in fp32, buckets of {BUCKET:,}, one micro-batch; medians, ms"
    lines = [
        f"# Exchange between replicas behind computation, {where}",
        "",
        f"`{typed()}`: {about()}",
    ]
    lines += ["", setting, "", *lines_of(rows)]
    print("\n".join(lines))
    arguments.out.mkdir(exist_ok=True)
    name = f"overlap_{where}_{datetime.date.today().isoformat()}"
    (arguments.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (arguments.out / f"{name}.json").write_text(json.dumps({"rows": rows, "about": about()}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
