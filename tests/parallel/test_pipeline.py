"""The executor on real ranks: gradients, time, what waits for what, and what is said when somebody is gone."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pieces import SHAPE, Piece, cut, micro_batches, network, whole_gradients
from ranks import RunOn
from torch import Tensor

from megapre.mesh import Mesh
from megapre.parallel.comm import Groups, connect
from megapre.parallel.pipeline import Executor
from megapre.parallel.pipes import Pipes
from megapre.schedule import Schedule, build

CPU = torch.device("cpu")
CHUNKS = {"gpipe": 2, "1f1b": 1, "interleaved": 2, "breadth_first": 2, "zb_h1": 1, "zbv": 2, "dualpipev": 2}


def pipeline() -> Groups:
    return connect(Mesh(dist.get_world_size(), pp=dist.get_world_size()), dist.get_rank(), CPU, wrap=True)


def mine(schedule: Schedule, rank: int, layers: list[Any], m: int) -> list[Piece]:
    """The pieces that `rank` holds of a network cut into uneven stages."""
    parts, last = cut(layers, schedule.stages), schedule.stages - 1
    stages = [schedule.stage_of(rank, chunk) for chunk in range(schedule.chunks)]
    return [Piece(parts[stage], micro_batches(m) if stage == 0 else None, stage == last) for stage in stages]


def gradients(name: str, m: int) -> tuple[dict[str, Tensor], float, float]:
    """This rank's gradients after two steps, the loss as it learns of it, and that of an evaluation."""
    groups = pipeline()
    schedule = build(name, groups.pp.size, CHUNKS[name], m)
    layers = network(12)
    chunks = mine(schedule, groups.rank, layers, m)
    pipes = Pipes(groups, SHAPE, torch.float64, timeout=60)
    executor = Executor(schedule, chunks, pipes)
    losses = []
    for runner in (executor, Executor(schedule, chunks, pipes, evaluation=True), executor):
        for chunk in chunks:
            chunk.total.zero_()
            chunk.net.zero_grad()
        runner.run()
        loss = sum(chunk.total for chunk in chunks)
        assert isinstance(loss, Tensor)
        runner.share(loss)
        losses.append(loss.item())
    assert all(not chunk.saved and not chunk.grads for chunk in chunks)
    assert losses[0] == losses[2]
    found = {f"{k}.{n}": p.grad for k, layer in enumerate(layers) for n, p in layer.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}, losses[0], losses[1]


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize(("p", "m"), [(2, 5), (4, 9)])
def test_gradients_are_those_of_one_rank(run_on: RunOn, name: str, p: int, m: int) -> None:
    results = run_on(p, gradients, name, m)
    found = {name: grad for grads, _, _ in results for name, grad in grads.items()}
    assert sum(len(grads) for grads, _, _ in results) == len(found) == 24, "each parameter on one rank"
    made = network(12)
    for k, (layer, wanted) in enumerate(zip(made, whole_gradients(12, m), strict=True)):
        for (n, _), want in zip(layer.named_parameters(), wanted, strict=True):
            grad = found[f"{k}.{n}"]
            if name == "breadth_first":  # adds the micro-batches in the other order
                torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(grad, want), f"{k}.{n}"
    whole = torch.nn.Sequential(*made)
    wanted_loss = sum(whole(x).square().sum() for x in micro_batches(m)).item()
    for _, loss, evaluated in results:
        assert loss == evaluated == pytest.approx(wanted_loss, rel=1e-12)
