"""The executor on real ranks: gradients, time, what waits for what, and what is said when somebody is gone."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from pieces import SHAPE, Piece, cut, micro_batches, network, whole_gradients
from ranks import RankError, RunOn
from torch import Tensor

from megapre.mesh import Mesh
from megapre.parallel.comm import Groups, connect
from megapre.parallel.pipeline import Executor
from megapre.parallel.pipes import PipelineError, Pipes
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
        dist.all_reduce(loss, group=groups.pp.handle)  # zero but on the rank with the last stage
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


class Obedient:
    """A chunk that does what it is told before an action, and nothing else."""

    def __init__(self, told: Callable[[str, int], None] = lambda kind, i: None, shape: tuple[int, ...] = (3,)) -> None:
        self.told, self.shape = told, shape

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        self.told("F", micro_batch)
        return torch.zeros(self.shape)

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor:
        self.told("B", micro_batch)
        return torch.zeros(self.shape)


def obey(chunk: Obedient, timeout: float, notes: Path | None = None, name: str = "1f1b") -> str:
    """A step of six micro-batches. Returns what went wrong and how long it took, or writes it down and is gone."""
    groups = pipeline()
    executor = Executor(build(name, groups.pp.size, 1, 6), [chunk], Pipes(groups, (3,), torch.float32, timeout))
    begin = time.monotonic()
    try:
        executor.run()
        text = "all went well"
    except PipelineError as error:
        text = f"{time.monotonic() - begin:.1f} s: {error}"
    if notes is not None:
        (notes / f"{groups.rank}").write_text(text)
        os._exit(3)
    return text


def die_early(notes: Path) -> None:
    def told(kind: str, i: int) -> None:
        if dist.get_rank() == 2 and (kind, i) == ("F", 2):
            os.kill(os.getpid(), signal.SIGKILL)

    obey(Obedient(told), 60.0, notes)


def test_a_killed_rank_ends_the_others_with_a_word(
    run_on: RunOn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "SETTLE", 30.0)  # let them all end by themselves
    with pytest.raises(RankError, match="rank 2 of 4 died, exit code -9") as caught:
        run_on(4, die_early, tmp_path)
    assert caught.value.ranks == (0, 1, 2, 3)
    said = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert sorted(said) == [0, 1, 3]
    for text in said.values():
        assert float(text.split()[0]) < 20, text  # and not the time it may take
        assert "connection lost" in text
    assert re.match(r"\S+ s: rank 1(, action \d+ of 12 \(\w+\.0\)| sends F\d\.0 to rank 2)", said[1])
    assert "rank 2" in said[1]
    assert re.match(r"\S+ s: rank 0.*rank 1", said[0])
    assert re.search(r"rank 3, action \d+ of 12 \(.*rank 2", said[3])


def never_send() -> str:
    def told(kind: str, i: int) -> None:
        if dist.get_rank() == 1 and (kind, i) == ("B", 1):
            time.sleep(4)

    return obey(Obedient(told), 1.0)


def test_a_receive_that_never_comes_names_rank_action_and_peer(run_on: RunOn) -> None:
    waits, loses = run_on(2, never_send)
    assert re.search(
        r"rank 0, action 4 of 12 \(B1\.0\), waits for B1\.0 of rank 1, from which it took 1 of 6 messages so far, "
        r"the last one its B0\.0: nothing in 1\.\d s",
        waits,
    )
    assert re.search(r"rank 1 .*rank 0", loses) and "connection lost" in loses


def never_take() -> str:
    def told(kind: str, i: int) -> None:
        if dist.get_rank() == 0 and (kind, i) == ("B", 1):
            time.sleep(3)

    return obey(Obedient(told), 1.0, name="gpipe")


def test_a_message_that_nobody_takes_is_noticed(run_on: RunOn) -> None:
    assert "rank 1 ran all its actions, but a peer took not all it sent: nothing in 1." in run_on(2, never_take)[1]


def sends_another_shape() -> str:
    return obey(Obedient(shape=(3,) if dist.get_rank() else (2, 3)), 1.0)


def test_a_message_of_another_shape_is_refused_by_who_sends_it(run_on: RunOn) -> None:
    said = run_on(2, sends_another_shape)[0]
    assert "rank 0 sends F0.0 to rank 1: a message of torch.float32 (2, 3) in a pipeline of torch.float32 (3,)" in said


def no_way_round() -> None:
    groups = connect(Mesh(3, pp=3), dist.get_rank(), CPU)
    schedule = build("interleaved", 3, 2, 3)
    match = "connect the pipeline with wrap=True"
    if groups.rank == 1:
        Executor(schedule, [Obedient()] * 2, Pipes(groups, (3,), torch.float32))
    else:
        with pytest.raises(ValueError, match=match):
            Executor(schedule, [Obedient()] * 2, Pipes(groups, (3,), torch.float32))


def test_a_missing_channel_is_noticed_before_the_first_step(run_on: RunOn) -> None:
    run_on(3, no_way_round)


class Remembered(np.ndarray):
    """Memory whose end can be seen."""

    alive = 0

    def __del__(self) -> None:
        Remembered.alive -= 1


def keep_outputs() -> int:
    """Most outputs that were there while a rank ran forwards."""
    most = 0

    class Seen(Obedient):
        def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
            nonlocal most
            if dist.get_rank() == 0:
                time.sleep(0.2)
            most = max(most, Remembered.alive)
            Remembered.alive += 1
            return torch.from_numpy(np.zeros(3, np.float32).view(Remembered))

    groups = pipeline()
    Executor(build("gpipe", 2, 1, 6), [Seen()], Pipes(groups, (3,), torch.float32, 60)).run()
    assert Remembered.alive == 0
    return most


def test_an_output_is_freed_once_it_was_sent(run_on: RunOn) -> None:
    assert run_on(2, keep_outputs)[0] <= 1
