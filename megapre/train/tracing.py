"""Timelines of chosen steps (run.trace): what every rank did when, beside what the schedule alone would have taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megapre.parallel import trace
from megapre.parallel.comm import gathered
from megapre.schedule.picture import write_picture

if TYPE_CHECKING:
    from .folder import RunFolder
    from .screen import Screen
    from .step import Engine


def write(recorded: trace.Trace, step: int, engine: Engine, folder: RunFolder, screen: Screen) -> None:
    """Writes traces/step_00000005.json for Perfetto, with every pipeline and the end of the step, and of the first
    pipeline a picture, measured above simulated. For all ranks to call. What fails is told, not raised.
    """
    own = recorded.records(engine.executor), recorded.phases()
    by_rank = gathered(own, engine.groups.world.handle)
    if not folder.ours:
        return
    plan, found, phases = engine.executor.schedule, {}, {}
    for ranks in engine.groups.mesh.groups("pp"):
        name = f"measured, ranks {', '.join(map(str, ranks))}"
        found[name] = trace.measured(plan, [by_rank[rank][0] for rank in ranks], begin=0.0)
        phases[name] = [by_rank[rank][1] for rank in ranks]
    name, first = next(iter(found.items()))
    alone = trace.simulated(first)
    file = folder.traces / f"step_{step:08d}.json"
    try:
        folder.traces.mkdir(exist_ok=True)
        trace.write(found | {"simulated with the times of the first": alone}, file, phases)
        shown = trace.measured(plan, [by_rank[rank][0] for rank in engine.groups.mesh.groups("pp")[0]])
        write_picture({name: shown, "simulated with these times": alone}, file.with_suffix(".png"), "s")
    except ImportError:
        screen.say(f"no {file.with_suffix('.png').name}: matplotlib is not installed; pip install 'megapre[observe]'")
    except Exception as error:  # a full disk, a font, a cache folder: all ranks would wait for this one
        screen.say(f"the trace of step {step} could not be written: {error}")
        return
    screen.say(f"traced step {step}: bubble {shown.bubble:.1%}, simulated {alone.bubble:.1%}: {file}")
