"""`megapre train --dry-run`: mesh, stages, memory and schedule of a run, worked out and printed. Nothing starts.

No torch, and any number of ranks: what 16,384 GPUs would do is arithmetic.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from .. import schedule
from ..config import Config
from ..data import with_vocab_of_data
from ..errors import UserError
from ..mesh import Mesh
from ..plan import predict, render
from ..plan.box import gib
from ..plan.hardware import named
from ..plan.link import Link
from ..plan.memory import all_ranks
from ..plan.partition import balanced, costs, layers_of_stages, schedule_of
from ..plan.stages import Rates, stage_costs
from ..schedule.draw import draw, summary
from .links import links

GPU, MFU = "NVIDIA H100 80GB HBM3", 0.5
"""What times are worked out for unless told. The picture hardly depends on it: it is a matter of ratios."""


class DryRunError(UserError):
    """A world that is not a number of ranks."""


def world_of(overrides: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """The number of ranks that `world=N` among the overrides says (0: none does), and the others."""
    worlds = [override.partition("=")[2] for override in overrides if override.startswith("world=")]
    for text in worlds:
        if not (text.isascii() and text.isdigit() and int(text)):
            raise DryRunError(f"world={text}: a number of ranks, as in world=16384")
    return int(worlds[-1]) if worlds else 0, tuple(o for o in overrides if not o.startswith("world="))


def run(cfg: Config, world: int = 0, gpu: str = GPU) -> int:
    """Prints what `cfg` on `world` ranks would be (0: as few as its layout needs), each a `gpu`, by its
    name or a part of it. Returns 0.

    A vocabulary that is left to the data is read from their sidecar. Raises MeshError, ConfigError, DataError,
    StageError, ScheduleError or UnknownDevice for what cannot be.
    """
    cfg = with_vocab_of_data(cfg)
    layout = cfg.layout
    mesh = Mesh.of(layout, world or layout.model_parallel * max(layout.dp, 1))
    gpu, device = named(gpu)
    rates, sources = Rates(device.bf16 * MFU, device.bandwidth), tuple[str, ...]()
    if layout.comm_profile:
        found = links(layout.comm_profile, gpu, layout, mesh.dp, Link(rates.latency, rates.link), None)
        messages, sources = found.messages, found.sources
        rates = replace(rates, latency=messages.latency, link=messages.bandwidth, tensor=found.tensor)
    actions = schedule.checked(schedule_of(cfg, mesh.dp))
    timeline = schedule.simulate(actions, stage_costs(cfg, layout.vpp, rates, actions.placement))
    shown, note = legible(timeline)
    print(render(predict(cfg, mesh, "cuda", gpu)))
    if layout.pp == 1:
        return 0
    print("", *stage_table(cfg, mesh, actions), "", sep="\n")
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else 100
    print(draw(shown, width, terminal), "", *note, summary(timeline), sep="\n")
    print(f"seconds on {gpu} at {MFU:.0%} of its peak", *sources, sep="\n")
    return 0


def legible(timeline: schedule.Timeline) -> tuple[schedule.Timeline, list[str]]:
    """What to draw of a schedule, and lines to say of it: itself, or where messages take longer than all the rest, as
    with a tiny model, the same without them. Actions would be specks in it otherwise.
    """
    costs = timeline.costs
    without = schedule.simulate(timeline.schedule, replace(costs, latency=0.0, bandwidth=math.inf))
    if timeline.makespan <= 2 * without.makespan:
        return timeline, []
    spans = [zip(*row, strict=True) for row in zip(without.starts, without.ends, strict=True)]
    actions = [1e6 * (end - start) for row in spans for start, end in row]
    message = 1e6 * (costs.latency + max(costs.message) / costs.bandwidth)
    return without, [
        f"drawn as if messages took no time: one takes {message:.3g} us here, actions {min(actions):.3g} to "
        f"{max(actions):.3g} us. With them:"
    ]


def stage_table(cfg: Config, mesh: Mesh, actions: schedule.Schedule) -> list[str]:
    """A line for each rank of a pipeline: layers of its chunks, its share of the work, the memory of one of its ranks.

    Where the ranks' work is unequal, a last line says what stages would balance it.
    """
    cut, (one, first, last) = layers_of_stages(cfg, placement=actions.placement), costs(cfg)
    bounds = [0, *accumulate(cut)]
    work = [n * one + first * (s == 0) + last * (s == len(cut) - 1) for s, n in enumerate(cut)]
    held = [[actions.stage_of(rank, chunk) for chunk in range(actions.chunks)] for rank in range(actions.ranks)]
    totals = [sum(work[stage] for stage in stages) for stages in held]
    rows = [("rank", "layers", "work", "memory")]
    memory = all_ranks(cfg, mesh.dp, "cuda", plan=actions)
    for rank, stages in enumerate(held):
        parts = []
        for stage in stages:
            part = f"{bounds[stage]}-{bounds[stage + 1] - 1}" if cut[stage] > 1 else f"{bounds[stage]}"
            parts.append(f"{'embedding + ' if stage == 0 else ''}{part}{' + head' if stage == len(cut) - 1 else ''}")
        rows.append((f"pp {rank}", ", ".join(parts), f"{totals[rank] / sum(totals):.1%}", gib(memory[rank].total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ranks = [actions.holder(stage)[0] for stage in range(len(cut))]
    better = balanced(cfg.model.layers, ranks, one, first, last)
    of_rank = [0.0] * actions.ranks
    for stage, layers in enumerate(better):
        of_rank[ranks[stage]] += layers * one + first * (stage == 0) + last * (stage == len(cut) - 1)
    if max(of_rank) < max(totals):
        lines.append(
            f"the fullest rank has {max(totals) / sum(totals) * actions.ranks:.3f} times the mean; with "
            f"layout.balance=true {max(of_rank) / sum(totals) * actions.ranks:.3f}: stages {list(better)}"
        )
    return lines
