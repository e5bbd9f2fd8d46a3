"""One rank of a world of processes: gloo_rank.py RANK RANKS FOLDER. Reads FOLDER/case.pt, writes FOLDER/rank<r>.pt.

Its results are those of a group of two and of the whole world, by the number of ranks.
"""

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from simulated_ranks import SECONDS, Arriving, Gather
from torch import Tensor

from megapre import kernels


def gather_in(group: dist.ProcessGroup) -> Gather:
    def gather(stats: Tensor) -> Arriving:
        out = stats.new_empty(dist.get_world_size(group), *stats.shape)
        work = dist.all_gather_into_tensor(out.flatten(0, 1), stats, group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out

        return Arriving(wait)

    return gather


def loss(case: dict[str, Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Loss, losses, the whole gradient of x, and that of this rank's rows of the weight."""
    op = kernels.choose("cpu").vocab_parallel_linear_cross_entropy
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    x, weight = case["x"].requires_grad_(), case["weight"].chunk(ranks)[rank].clone().requires_grad_()
    columns = rank * len(weight), int(case["vocab"])
    total, losses = op(x, weight, case["labels"], gather_in(group), *columns, -100, 0.1, 1e-3, return_losses=True)
    dx, dweight = torch.autograd.grad(total, (x, weight))
    dist.all_reduce(dx, group=group)
    return [total.detach(), losses, dx, dweight]


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    patience = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=patience)
    case = torch.load(folder / "case.pt")
    groups = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
    torch.save({2: loss(case, groups[rank // 2]), ranks: loss(case, dist.group.WORLD)}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
