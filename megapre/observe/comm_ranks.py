"""What `megapre bench comm` and `megapre tune comm` begin with on every rank: its place, its device, all groups."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from .. import __version__
from ..config import Comm, Layout, Run
from ..errors import UserError
from ..mesh import Mesh

if TYPE_CHECKING:
    import torch

    from ..parallel.comm import Groups, Place
    from ..parallel.stopwatch import Watch

T = TypeVar("T")


class BenchCommError(UserError):
    """A request that cannot be measured on the ranks that there are."""


@dataclass(frozen=True)
class Ranks:
    """All ranks, as this one sees them."""

    here: Place
    device: torch.device
    groups: Groups
    stopwatch: Watch

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks."""
        return self.here.rank == 0

    def key(self) -> dict[str, str | int]:
        from ..parallel.tuned import key

        return key(self.device, self.here, self.groups.mesh)

    def about(self) -> dict[str, str | int]:
        """The head of a report: the key of a profile, the version, the day and the command."""
        return {
            **self.key(),
            "megapre": __version__,
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["megapre", *sys.argv[1:]]),
        }


def on_ranks(verb: str, layout: Layout, run: Run, options: Comm, work: Callable[[Ranks], T]) -> T:
    """`work` on the ranks that a launcher has started, with the groups of `layout` among them, made as `options` say,
    and a device as `run` says.

    Raises BenchCommError for one rank, DeviceError, MeshError where the layout does not fit the ranks, CommError.
    """
    from ..parallel import comm
    from ..parallel.stopwatch import Stopwatch
    from ..parallel.tuned import options as by_axis
    from ..train import machine

    here = comm.place(os.environ)
    if here.world == 1:
        raise BenchCommError(
            f"{verb} comm: one rank has nobody to talk to; start several, as in `megapre launch local --nproc 2 {verb} "
            f"comm` or `torchrun --nproc-per-node 8 -m megapre {verb} comm`"
        )
    mesh = Mesh.of(layout, here.world)
    device = machine.prepare(run, here)
    comm.join(here, device, options.timeout)
    with comm.blaming_others(here.rank):
        groups = comm.connect(mesh, here.rank, device, options=by_axis(options, {}))
        result = work(Ranks(here, device, groups, Stopwatch(groups.world, device)))
    del groups
    comm.leave()
    return result
