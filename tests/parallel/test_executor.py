"""The executor on one rank: order, hand-over between chunks, equality with plain autograd, when receives are posted."""

import gc
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pieces import Piece, cut, micro_batches, network, whole_gradients
from torch import Tensor, nn

from megapre.parallel.handover import AHEAD, messages, steps
from megapre.parallel.pipeline import ON_DEVICE, Executor, Pace
from megapre.parallel.pipes import PipelineError
from megapre.schedule import BUILDERS, Action, Schedule, ScheduleError, build


def local(name: str, chunks: int, m: int) -> tuple[list[Piece], list[nn.Module]]:
    layers = network(7)
    pieces = [
        Piece(part, micro_batches(m) if i == 0 else None, i == chunks - 1) for i, part in enumerate(cut(layers, chunks))
    ]
    Executor(build(name, 1, chunks, m), pieces).run()
    return pieces, layers


LOCAL = [(name, v) for name, row in BUILDERS.items() for v in (1, 2, 3) if row.least <= v <= (row.most or 3)]


@pytest.mark.parametrize(("name", "chunks"), LOCAL)
def test_chunks_of_a_network_give_the_gradients_of_the_whole(name: str, chunks: int) -> None:
    pieces, layers = local(name, chunks, 5)
    for layer, wanted in zip(layers, whole_gradients(7, 5), strict=True):
        for p, want in zip(layer.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-12)  # breadth_first adds in another order
    assert all(not piece.saved for piece in pieces)


def test_one_rank_of_1f1b_holds_one_micro_batch_at_a_time() -> None:
    pieces, _ = local("1f1b", 1, 7)
    assert pieces[0].in_flight == 1


def test_evaluation_runs_the_forwards_alone() -> None:
    layers = network(4)
    data = micro_batches(3)
    pieces = [Piece(part, data if i == 0 else None, i == 1) for i, part in enumerate(cut(layers, 2))]
    Executor(build("interleaved", 1, 2, 3), pieces, evaluation=True).run()
    wanted = sum(nn.Sequential(*layers)(x).square().sum() for x in data)
    assert pieces[1].total.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert all(not piece.saved for piece in pieces)
    assert all(p.grad is None for layer in layers for p in layer.parameters())


class Remembered(np.ndarray):
    """Memory whose end can be seen."""

    alive = 0

    def __del__(self) -> None:
        Remembered.alive -= 1


class Wasteful:
    """Its outputs are 1; it keeps none of them."""

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        Remembered.alive += 1
        return torch.from_numpy(np.ones(2, np.float32).view(Remembered))

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad


def test_what_was_handed_over_is_not_kept() -> None:
    most = 0

    class Last(Wasteful):
        def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
            nonlocal most
            most = max(most, Remembered.alive)
            return torch.zeros(())

        def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor:
            return torch.zeros(2)

    order = [Action(kind, chunk, i) for i in range(5) for kind, chunk in (("F", 0), ("F", 1), ("B", 1), ("B", 0))]
    Executor(Schedule("by turns", 2, 5, (tuple(order),)), [Wasteful(), Last()]).run()
    gc.collect()
    assert most == 1 and Remembered.alive == 0


def test_a_schedule_for_other_chunks_or_ranks_is_refused() -> None:
    piece = Piece(nn.Identity(), [], True)
    with pytest.raises(ValueError, match=r"for 1 ranks of 2 chunks; here are 1 ranks, and 1 chunks on rank 0"):
        Executor(build("gpipe", 1, 2, 1), [piece])
    with pytest.raises(ValueError, match=r"for 2 ranks of 1 chunks; here are 1 ranks"):
        Executor(build("gpipe", 2, 1, 1), [piece])


def test_a_schedule_that_cannot_run_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"B0\.0 is missing"):
        Executor(Schedule("half", 1, 1, ((Action("F", 0, 0),),)), [Piece(nn.Identity(), [], True)])


def test_a_chunk_that_cannot_split_its_backward_is_refused() -> None:
    schedule = Schedule("split", 1, 1, ((Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)),))
    with pytest.raises(ValueError, match=r"I0\.0 is half of a backward, and Wasteful cannot split it"):
        Executor(schedule, [Wasteful()])


def _sizes(name: str) -> st.SearchStrategy[Schedule]:
    chunks = st.just(1) if BUILDERS[name].most == 1 else st.integers(2, BUILDERS[name].most or 4)

    def made(p: int, v: int, m: int) -> Schedule:
        return build(name, p, v, m)

    return st.builds(made, st.integers(2, 8), chunks, st.integers(16, 24))


@given(st.sampled_from(sorted(BUILDERS)).flatmap(_sizes), st.booleans())
def test_receives_are_posted_in_the_order_of_the_channel_and_stand_before_nothing(
    schedule: Schedule, evaluation: bool
) -> None:
    for rank in range(schedule.ranks):
        row = list(steps(schedule, rank, evaluation))
        posted: dict[int, list[int]] = {}
        taken: dict[int, set[int]] = {}
        for at, step in enumerate(row):
            soon = {later.receives for later in row[at : at + 1 + AHEAD] if later.receives}
            for peer, event in step.posts:
                posted.setdefault(peer, []).append(event)
            if step.receives is not None:
                peer, event = step.receives
                assert event in posted[peer]
                taken.setdefault(peer, set()).add(event)
            for peer, events in posted.items():
                arrived = max((events.index(event) + 1 for event in taken.get(peer, ())), default=0)
                assert len(events) - arrived <= 1, "more than one receive may wait for its message"
                if len(events) > arrived and step.posts and events[-1] == step.posts[-1].event:
                    assert any(way.peer == peer for way in soon)
        for peer, events in posted.items():
            assert events == [event for _, event in messages(schedule, peer, rank, evaluation)]
            assert taken[peer] == set(events)


def test_the_hand_overs_of_a_row_match_those_of_its_peers() -> None:
    schedule = build("zbv", 3, 2, 6)
    rows = [list(steps(schedule, rank)) for rank in range(3)]
    sent = {(rank, way) for rank, row in enumerate(rows) for way in [step.sends for step in row] if way}
    received = {(rank, way) for rank, row in enumerate(rows) for way in [step.receives for step in row] if way}
    assert {(way.peer, rank, way.event) for rank, way in sent} == {
        (rank, way.peer, way.event) for rank, way in received
    }
    for row in rows:
        assert {step.gives for step in row} == {step.takes for step in row}
    turn = [step for step in rows[2] if step.gives is not None]
    assert {str(step.action)[0] for step in turn} <= {"F", "B", "I"} and len(turn) == 2 * 6


class Event:
    """Stands for a CUDA event: what is in `ended` by number of issue has ended."""

    ended: ClassVar[set[int]] = set()
    issued = 0
    asked: ClassVar[list[int]] = []

    def record(self) -> None:
        self.number, Event.issued = Event.issued, Event.issued + 1

    def query(self) -> bool:
        Event.asked.append(self.number)
        return self.number in Event.ended


def test_the_host_is_a_few_actions_ahead_and_sees_what_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    executor: Any = SimpleNamespace(pipes=SimpleNamespace(timeout=0.1), where=lambda at: f"rank 0, action {at}")
    pace = Pace(executor)
    for at in range(ON_DEVICE):
        pace.issued(at, None)
    assert not Event.asked, "nothing to wait for yet"
    Event.ended.update({0, 1})
    pace.issued(8, None)
    pace.issued(9, None)
    assert Event.asked == [0, 1]
    came: Any = SimpleNamespace(work=SimpleNamespace(is_completed=lambda: True))
    with pytest.raises(PipelineError, match=r"rank 0, action 2: not done in 0\.1 s"):
        pace.issued(10, came)
    Event.ended.update(range(3, 10))
    with pytest.raises(PipelineError, match=r"rank 0, action 10 \(which came\): not done in 0\.1 s"):
        pace.settle()
