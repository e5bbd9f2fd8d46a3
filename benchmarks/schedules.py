"""How soon pipeline schedules are built, checked and simulated, and what they lose, against torch's.

    python benchmarks/schedules.py [--repeats 3]

    large    64 ranks, 512 micro-batches, 8 chunks a rank (or as many as a schedule can have): half a million actions.
             Goals: build and check in 5 s, simulate in 10 s.
    peer     torch.distributed.pipelining's interleaved 1F1B: its order (build), the sends and receives that it puts in,
             by which it finds deadlocks (check), and its dry run in steps of equal length (simulate). At 16 ranks, 128
             micro-batches and 4 chunks: the large size takes it more than a minute.
    bubbles  simulated, beside the closed form, for 8 ranks and 32 micro-batches.

Minimum of the repeats, in seconds of one core's work (process time): other programs on the machine do not count. Prints
tables and writes them to benchmarks/results/schedules_<hardware>_<date>.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from typing import Any

from train_step import RESULTS, about, hardware, typed

from megapre.schedule import BUILDERS, Action, Costs, Schedule, build, check, simulate
from megapre.schedule.formulas import bubble

LARGE, SMALL = (64, 8, 512), (16, 4, 128)  # ranks, chunks, micro-batches
CHECK_GOAL, SIMULATE_GOAL = 5.0, 10.0  # s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    large = [ours(name, LARGE, repeats) for name in BUILDERS]
    small = [ours("interleaved", SMALL, repeats), torchs(SMALL, repeats)]
    bubbles = [lost(name, 8, 2 if name == "breadth_first" else row.least, 32) for name, row in BUILDERS.items()]
    where = hardware("cpu")
    lines = [f"# Schedules on {where}", "", f"`{typed()}`: {about()}", ""]
    lines += timings("64 ranks, 512 micro-batches", large)
    lines += timings("16 ranks, 128 micro-batches, 4 chunks: the peer", small)
    lines += ["## 8 ranks, 32 micro-batches", ""]
    lines += ["| schedule | chunks | bubble | closed form | micro-batches in flight |", "|---|--:|--:|--:|--:|"]
    lines += [f"| {r['name']} | {r['chunks']} | {r['bubble']:.4f} | {r['form']:.4f} | {r['held']:g} |" for r in bubbles]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    name = f"schedules_{where}_{datetime.date.today().isoformat()}"
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    content = {"large": large, "peer": small, "bubbles": bubbles, "about": about()}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def timings(title: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"## {title}", "", "| schedule | chunks | actions | build s | check s | simulate s | goals |"]
    lines += ["|---|--:|--:|--:|--:|--:|---|"]
    for row in rows:
        met = row["build"] + row["check"] <= CHECK_GOAL and row["simulate"] <= SIMULATE_GOAL
        lines.append(
            f"| {row['name']} | {row['chunks']} | {row['actions']:,} | {row['build']:.3f} | {row['check']:.3f} | "
            f"{row['simulate']:.3f} | {'met' if met else 'missed'} |"
        )
    return [*lines, ""]


def ours(name: str, sizes: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    ranks, chunks, micro_batches = sizes
    chunks = min(chunks, BUILDERS[name].most or chunks)
    schedule = build(name, ranks, chunks, micro_batches)
    costs = Costs.of(schedule.stages, message=1.0, bandwidth=10.0, latency=0.05)
    assert check(schedule) == []
    return {
        "name": name,
        "chunks": chunks,
        "actions": sum(map(len, schedule)),
        "build": least(lambda: build(name, ranks, chunks, micro_batches), repeats),
        "check": least(lambda: check(schedule), repeats),
        "simulate": least(lambda: simulate(schedule, costs), repeats),
    }


def torchs(sizes: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """What torch does when it makes an interleaved schedule: order; sends and receives; and its dry run of them."""
    from torch.distributed.pipelining import schedules as torch

    ranks, chunks, micro_batches = sizes
    made: Any = object.__new__(torch.ScheduleInterleaved1F1B)
    made.__dict__.update(_n_microbatches=micro_batches, pp_group_size=ranks, n_local_stages=chunks)
    made.microbatches_per_round = micro_batches // max(1, micro_batches // ranks)

    def order() -> dict[int, list[Any]]:
        return {rank: made._calculate_single_rank_operations(rank) for rank in range(ranks)}

    def holder(stage: int) -> int:
        return stage % ranks

    def sends() -> dict[int, list[Any]]:
        found = {rank: [action for action in actions if action] for rank, actions in order().items()}
        return torch._add_send_recv(found, holder, ranks * chunks)

    lowered = sends()
    assert same(order(), build("interleaved", ranks, chunks, micro_batches))
    build_s = least(order, repeats)
    return {
        "name": "torch's interleaved 1F1B",
        "chunks": chunks,
        "actions": 2 * ranks * chunks * micro_batches,
        "build": build_s,
        "check": least(sends, repeats) - build_s,
        "simulate": least(lambda: torch._simulate_comms_compute(lowered, holder, ranks * chunks), 1),
    }


def same(theirs: dict[int, list[Any]], schedule: Schedule) -> bool:
    for rank, actions in theirs.items():
        kinds = ["F" if a.computation_type.name == "FORWARD" else "B" for a in actions if a]
        places = [(a.stage_index // schedule.ranks, a.microbatch_index) for a in actions if a]
        if [Action(kind, *place) for kind, place in zip(kinds, places, strict=True)] != list(schedule[rank]):  # type: ignore[arg-type]
            return False
    return True


def lost(name: str, ranks: int, chunks: int, micro_batches: int) -> dict[str, Any]:
    timeline = simulate(build(name, ranks, chunks, micro_batches), Costs.of(ranks * chunks))
    form = bubble(name, ranks, chunks, micro_batches)
    held = max(timeline.in_flight) / chunks
    return {"name": name, "chunks": chunks, "bubble": timeline.bubble, "form": form, "held": held}


def least(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


if __name__ == "__main__":
    main()
