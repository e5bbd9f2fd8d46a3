"""Times the training step itself, the same `Engine.step` that `megapre train` runs.

Tokens are made up (uniform, from a fixed seed) unless the recipe names data that is there; a step costs the same either
way. Steps are timed one by one and the device is waited for only at the end.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import closing
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import torch

from megapre import __version__
from megapre.config import GPT2_VOCAB
from megapre.data import GlobalBatch, MicroBatch, build_loader
from megapre.optim.schedules import lr_at
from megapre.parallel.comm import blaming_others, first_alone, gathered, join, leave, place, together
from megapre.parallel.tuned import tuned

from . import machine
from .metrics import bytes_text, percent_text
from .planned import plan_of
from .settle import data_prefixes, settle
from .step import Engine, connected, mesh_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from megapre.config import Config
    from megapre.parallel.comm import Place


def step(cfg: Config, steps: int = 10, warmup: int = 3, json_path: str | Path | None = None) -> dict[str, Any]:
    """Runs `warmup` + `steps` training steps of `cfg`, prints and returns their timing; `json_path` gets it too.

    Keys: step_s p20, p50, p80 (seconds), tokens_per_s (at the median), mfu (fraction or null), peak_memory_bytes.
    """
    here = place(os.environ)
    mesh_of(cfg, here)
    device = machine.prepare(cfg.run, here)
    join(here, device, cfg.comm.timeout)
    with blaming_others(here.rank):
        found = _step(cfg, steps, warmup, here, device)
    leave()
    if here.rank == 0 and json_path is not None:
        Path(json_path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _step(cfg: Config, steps: int, warmup: int, here: Place, device: torch.device) -> dict[str, Any]:
    longer = cfg.run.model_copy(update={"steps": max(cfg.run.steps, warmup + steps)})  # data enough for all of them
    cfg = cfg.model_copy(update={"run": longer})
    real = bool(data_prefixes(cfg)) and all(Path(f"{prefix}.idx").exists() for prefix in data_prefixes(cfg))
    if real:
        cfg, _ = settle(cfg)
    else:
        cfg = cfg if cfg.model.vocab else cfg.with_vocab(GPT2_VOCAB)
    chosen = tuned(cfg, here, device)
    if here.rank == 0 and cfg.layout.comm_profile:
        print(f"communication profile {chosen.state}")
    cfg = cfg.model_copy(update={"layout": chosen.layout})
    groups = connected(cfg, here, device, chosen.options)
    dp, ranks = groups.dp, groups.world.handle
    with together(ranks):
        plan = plan_of(cfg, device, groups.mesh, here)
    engine = Engine(cfg, device, groups)
    marks = []
    with together(ranks), first_alone(ranks):
        source = build_loader(cfg, "train", dp.index, dp.size) if real else made_up(cfg, dp.index, dp.size)
    with closing(source) as batches:
        for number in range(1, warmup + steps + 1):
            begin = machine.now(device)
            result = engine.step(next(batches), lr_at(number, cfg.optim, cfg.run.steps))
            marks.append((begin, machine.now(device)))
    loss = float(result.loss)
    all_times = gathered([machine.seconds(*mark) for mark in marks[warmup:]], ranks)
    times = [max(step) for step in zip(*all_times, strict=True)]
    p20, p50, p80 = percentiles(times)
    tokens_per_s = cfg.batch.tokens / p50
    mfu, memory = plan.mfu(tokens_per_s), max(gathered(machine.peak_memory(device), ranks))
    found = {
        "recipe": cfg.name,
        "device": machine.describe(device),
        "world": here.world,
        "layout": cfg.layout.model_dump(mode="json"),
        "torch": torch.__version__,
        "megapre": __version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "dtype": cfg.run.dtype,
        "compile": cfg.run.compile,
        "kernels": engine.ops.names,
        "tokens": "data" if real else "made up",
        "micro_batch": cfg.batch.micro,
        "global_batch": cfg.batch.global_,
        "seq_length": cfg.batch.seq_length,
        "parameters": sum(plan.parameters),
        "warmup": warmup,
        "steps": steps,
        "step_s": {"p20": p20, "p50": p50, "p80": p80},
        "tokens_per_s": tokens_per_s,
        "mfu": mfu,
        "peak_memory_bytes": memory,
        "last_loss": loss,
    }
    across = f" on {here.world} ranks" if here.world > 1 else ""
    if here.rank == 0:
        print(
            f"{cfg.name}{across} on {machine.describe(device)}: step {p50 * 1e3:.1f} ms "
            f"(p20 {p20 * 1e3:.1f}, p80 {p80 * 1e3:.1f}) | {tokens_per_s:,.0f} tok/s | mfu {percent_text(mfu)} | "
            f"peak memory {bytes_text(memory)}"
        )
    return found


def made_up(cfg: Config, dp_rank: int = 0, dp_size: int = 1) -> Generator[GlobalBatch]:
    """Endless batches of uniform tokens; eight different ones, made once, so that making them is not timed."""
    generator = torch.Generator().manual_seed(cfg.data.seed)
    micro_batches = cfg.batch.micro_batches(dp_size)
    shape = (8, dp_size, micro_batches, cfg.batch.micro, cfg.batch.seq_length + 1)
    lines = torch.randint(cfg.model.vocab, shape, generator=generator)[:, dp_rank]
    while True:
        for line in lines:
            parts = tuple(MicroBatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), None, None) for t in line)
            yield GlobalBatch(parts, cfg.batch.tokens // dp_size, cfg.batch.global_)


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80; all the same for a single time."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    cuts = quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]
