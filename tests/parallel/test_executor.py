"""The executor: order, hand-over between chunks, and equality with plain autograd."""

import pytest
import torch
from torch import Tensor, nn

from megapre.parallel.pipeline import Executor
from megapre.schedule import Action, build


class Stage:
    """A piece of a network as a chunk; the last one turns its output into a loss."""

    def __init__(self, net: nn.Module, data: list[Tensor] | None, last: bool) -> None:
        self.net, self.data, self.last = net, data, last
        self.saved: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.in_flight = 0

    def forward(self, micro_batch: int, x: Tensor | None) -> Tensor:
        if x is None:
            assert self.data is not None
            leaf, x = None, self.data[micro_batch]
        else:
            leaf = x = x.detach().requires_grad_()
        y = self.net(x)
        y = y.square().sum() if self.last else y
        self.saved[micro_batch] = leaf, y
        self.in_flight = max(self.in_flight, len(self.saved))
        return y

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        leaf, y = self.saved.pop(micro_batch)
        y.backward(grad)
        return None if leaf is None else leaf.grad


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_chunks_of_a_network_give_the_gradients_of_the_whole(chunks: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    data = [torch.randn(4, 6) for _ in range(5)]
    whole = nn.Sequential(*layers)
    sum(whole(x).square().sum() for x in data).backward()
    expected = [p.grad.clone() for p in whole.parameters()]
    whole.zero_grad()

    cuts = [layers[i * 3 // chunks : (i + 1) * 3 // chunks] for i in range(chunks)]
    stages = [Stage(nn.Sequential(*cut), data if i == 0 else None, i == chunks - 1) for i, cut in enumerate(cuts)]
    Executor(build("gpipe", 1, chunks, 5)[0], stages).run()
    for p, want in zip(whole.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-5, atol=1e-6)  # micro-batches are added in another order
    assert all(not stage.saved for stage in stages)


def test_one_rank_of_1f1b_holds_one_micro_batch_at_a_time() -> None:
    stage = Stage(nn.Linear(3, 3), [torch.randn(2, 3) for _ in range(7)], True)
    Executor(build("1f1b", 1, 1, 7)[0], [stage]).run()
    assert stage.in_flight == 1


def test_a_schedule_that_names_more_chunks_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\].*0\.\.0"):
        Executor(build("gpipe", 1, 2, 1)[0], [Stage(nn.Identity(), [], True)])


def test_a_schedule_that_leaves_work_undone_is_noticed() -> None:
    stages = [Stage(nn.Linear(2, 2), [torch.ones(1, 2)], False), Stage(nn.Linear(2, 2), None, True)]
    with pytest.raises(AssertionError, match="never consumed"):
        Executor([Action("F", 0, 0)], stages).run()
