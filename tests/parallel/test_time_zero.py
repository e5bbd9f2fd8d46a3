"""Time zero of a trace is one moment on all ranks, whatever their clocks say and whenever each comes to it."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn

from megapre.mesh import Mesh
from megapre.parallel import trace as tracing
from megapre.parallel.comm import connect
from megapre.parallel.trace import Phase, Trace

CPU = torch.device("cpu")


def phases_of_one_late_rank(folder: str) -> list[Phase]:
    """The clock is a file, so that no time passes but what the ranks let pass; each shows it with an error of its own.
    The last rank lets 7 seconds pass before it comes to the trace, when the others have had time to begin without it.
    """
    clock, rank, last = Path(folder) / "clock", dist.get_rank(), dist.get_world_size() - 1

    def meet_at(seconds: float) -> None:
        dist.barrier()
        if rank == 0:
            clock.write_text(str(seconds))
        dist.barrier()

    world = connect(Mesh(last + 1), rank, CPU).world
    meet_at(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "time", SimpleNamespace(perf_counter=lambda: 1000.0 * rank + float(clock.read_text())))
        if rank == last:
            time.sleep(0.5)
            clock.write_text("7")
        trace = Trace(world, CPU)
        meet_at(9)
        trace.phase("update")
        meet_at(12)
        trace.phase("")
        return trace.phases()


def test_time_zero_is_when_the_last_rank_has_come(run_on: RunOn, tmp_path: Path) -> None:
    assert run_on(4, phases_of_one_late_rank, str(tmp_path)) == [[Phase("update", 2.0, 5.0)]] * 4
