"""`megapre schedule`: pipeline schedules drawn, checked and compared."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import schedule as schedules
from ..errors import UserError
from ..plan.box import counted
from ..schedule import BUILDERS, Costs, Schedule, ScheduleError
from ..schedule.compare import Row, best
from ..schedule.compare import compare as rows_of

if TYPE_CHECKING:
    from rich.table import Table

    from ..config import Config

GIB = 2**30
SHOWN = 40  # problems
PIPED = 100  # characters where there is no terminal


@dataclass(frozen=True)
class Sizes:
    """Of a pipeline: ranks, micro-batches a step, and the chunks a rank that are tried."""

    ranks: int
    micro_batches: int
    chunks: tuple[int, ...]


def find(name: str, ranks: int, chunks: int, micro_batches: int, group: int) -> Schedule:
    """The schedule of that name in these sizes, 0 being the fewest it can have; or what the file of that name holds."""
    if name not in BUILDERS and ("." in name or "/" in name or Path(name).exists()):
        return schedules.read(name)
    least = BUILDERS[name].least if name in BUILDERS else 1
    return schedules.build(name, ranks, chunks or least, micro_batches, group=group or None)


def show(
    schedule: Schedule,
    times: str,
    latency: float,
    width: int,
    colour: bool | None,
    png: str | None,
    trace: str | None,
    save: str | None,
) -> int:
    """Prints the timeline; writes the files that are named. Raises ScheduleError where the schedule cannot run."""
    from ..schedule.draw import draw, summary

    timeline = schedules.simulate(schedules.checked(schedule), equal_costs(schedule, times, latency))
    terminal = sys.stdout.isatty()
    room = width or (shutil.get_terminal_size().columns if terminal else PIPED)
    print(summary(timeline), draw(timeline, room, terminal if colour is None else colour), sep="\n\n")
    if save:
        schedules.write(schedule, save)
    if trace:
        from ..schedule.trace import write_trace

        write_trace(timeline, trace)
    if png:
        from ..schedule.picture import write_picture

        write_picture({"": timeline}, png)
    for path in filter(None, (save, trace, png)):
        print(f"written: {path}")
    return 0


def check(schedule: Schedule, in_flight: int | None = None, unreceived: int | None = None) -> int:
    """Prints what is wrong, a line for each problem, and returns 1; or that nothing is, and 0."""
    problems = schedules.check(schedule, in_flight=in_flight, unreceived=unreceived)
    for problem in problems[:SHOWN]:
        print(problem)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN:,} more")
    actions = sum(map(len, schedule))
    if not problems:
        most = max(map(schedules.peak_in_flight, schedule))
        sizes = f"{counted(schedule.ranks, 'rank')}, {counted(schedule.chunks, 'chunk')}"
        print(
            f"{schedule.name}: {actions:,} actions of {sizes} and {counted(schedule.micro_batches, 'micro-batch')} are "
            f"complete and cannot deadlock; at most {counted(most, 'activation')} in flight on a rank"
        )
    return 1 if problems else 0


def compare(sizes: Sizes, times: str, in_flight: float | None = None, memory: float | None = None) -> int:
    """Prints a row for each schedule, with the same costs for every rank."""
    if memory is not None:
        raise ScheduleError("compare: --memory needs a RECIPE, whose model gives the bytes; without, use --in-flight")
    rows = rows_of(sizes.ranks, sizes.micro_batches, sizes.chunks, lambda plan: equal_costs(plan, times))
    print(f"{counted(sizes.ranks, 'rank')}, {counted(sizes.micro_batches, 'micro-batch')}, messages cost nothing\n")
    return _print(rows, "", in_flight, None)


def compare_recipe(
    cfg: Config,
    micro_batches: int,
    chunks: str,
    world: int,
    gpu: str,
    mfu: float,
    link: float,
    latency: float,
    in_flight: float | None = None,
    memory: float | None = None,
    comm_profile: str = "",
    tp_link: float = 300.0,
) -> int:
    """Prints a row for each schedule, with the costs and the memory of the recipe's model in its layout.

    `link` (GB/s) and `latency` (us) are those of a message and of the collectives among replicas, `tp_link` (GB/s of
    bus bandwidth) is that among tensor-parallel ranks, where `comm_profile` names no file with measured ones.
    """
    from ..data import with_vocab_of_data
    from ..mesh import Mesh
    from ..plan import fullest_rank
    from ..plan.communication import of_data
    from ..plan.hardware import named
    from ..plan.link import Link
    from ..plan.partition import known_vocab
    from ..plan.stages import Rates, stage_costs
    from .links import links

    layout = cfg.layout
    if layout.pp == 1:
        raise ScheduleError("compare: layout.pp = 1 is no pipeline; set layout.pp, or --ranks")
    cfg = with_vocab_of_data(cfg)
    known_vocab(cfg)  # or every schedule would be refused for it
    gpu, device = named(gpu)
    peak = device.peak("bf16" if cfg.run.dtype == "fp16" else cfg.run.dtype)
    assert peak is not None, "every device has a rate for what a run can be in"
    dp = Mesh(world, layout.tp, layout.pp, layout.cp).dp if world else layout.dp or 1
    given = Link(latency * 1e-6, link * 1e9), Link(latency * 1e-6, tp_link * 1e9)
    found = links(comm_profile, gpu, layout, dp, *given)
    rates = Rates(peak * mfu, device.bandwidth, found.messages.latency, found.messages.bandwidth, found.tensor)
    counts = micro_batches or cfg.batch.micro_batches(dp)
    tried = numbers(chunks, "chunks") if chunks else (max(layout.vpp, 2),)
    rows = rows_of(
        layout.pp,
        counts,
        tried,
        lambda plan: stage_costs(cfg, plan.chunks, rates, plan.placement),
        lambda plan: fullest_rank(cfg, dp, "cuda", plan=plan).total,
        lambda timeline: of_data(cfg, timeline, dp, found.replicas),
        layout.group or None,
    )
    print(
        f"{cfg.name}: tp {layout.tp}, pp {layout.pp}, cp {layout.cp}, dp {dp}; {counted(counts, 'micro-batch')} of "
        f"{cfg.batch.micro} x {cfg.batch.seq_length:,} tokens\n{device.names[0]} at {mfu:.0%} of {peak / 1e12:.0f} "
        f"TFLOP/s"
    )
    print(*found.sources, "", sep="\n")
    return _print(rows, "ms", in_flight, None if memory is None else memory * GIB)


def numbers(text: str, what: str) -> tuple[int, ...]:
    """Whole numbers of at least 1 with commas between. Raises ScheduleError for others."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ScheduleError(f"--{what} {text!r}: whole numbers of at least 1 with commas between, as in 2,4")
    return tuple(map(int, words))


def equal_costs(schedule: Schedule, times: str, latency: float = 0.0) -> Costs:
    """The times of a rank's whole share of the model, an equal part of them for each of its chunks."""
    try:
        forward, of_input, of_weights = (float(word) / schedule.chunks for word in times.split(","))
    except ValueError:
        raise ScheduleError(f"--times {times!r}: three numbers, of F, I and W, as in 1,1,1") from None
    return Costs.of(schedule.stages, forward, of_input, of_weights, latency=latency)


def _print(rows: Sequence[Row], unit: str, in_flight: float | None, memory: float | None) -> int:
    from rich.console import Console

    chosen: Row | None = None
    try:
        chosen = best(rows, in_flight, memory)
        limits = [f"{memory / GIB:g} GiB a rank"] if memory is not None else []
        limits += [f"{in_flight:g} micro-batches in flight"] if in_flight is not None else []
        last = f"best{' within ' + ' and '.join(limits) if limits else ''}: {chosen.name}"
    except UserError as error:
        last = str(error)
    Console(width=None if sys.stdout.isatty() else 120).print(_table(rows, chosen, unit))
    print(f"\nin flight: micro-batches' activations on the fullest rank; messages: of the busiest rank\n{last}")
    return 0 if chosen else 1


def _table(rows: Sequence[Row], chosen: Row | None, unit: str) -> Table:
    from rich.table import Table

    with_bytes = any(row.memory is not None for row in rows)
    scale = 1e3 if unit == "ms" else 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("schedule", no_wrap=True)
    names = ["chunks", f"step{' ' + unit if unit else ''}", "bubble", "in flight", "messages"]
    for name in [*names, *(["dp ms", "sent GiB", "memory GiB"] if with_bytes else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    if any(row.refused for row in rows):
        table.add_column("", ratio=1)
    for row in rows:
        style = "bold" if row is chosen else ""
        name = f"{row.name} *" if row is chosen else row.name
        if row.timeline is None:
            table.add_row(name, str(row.chunks), *[""] * (len(names) - 1 + 3 * with_bytes), row.refused, style="dim")
            continue
        cells = [f"{row.step * scale:,.5g}", f"{row.timeline.bubble:.1%}", f"{row.in_flight:g}"]
        cells.append(f"{row.messages:,}")
        if with_bytes:
            cells += [
                f"{row.exposed * scale:,.3g}",
                f"{max(row.timeline.sent) / GIB:.3g}",
                f"{(row.memory or 0) / GIB:.1f}",
            ]
        table.add_row(name, str(row.chunks), *cells, style=style)
    return table
