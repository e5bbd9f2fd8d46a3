"""Flat buffers: parameters are views, gradients land in them whatever the dtype and the number of micro-batches."""

import pytest
import torch
from torch import nn

from megapre import kernels
from megapre.model import decays
from megapre.parallel.data import FlatParameters
from megapre.plan.flat import ALIGNMENT


class Tied(nn.Module):
    """Two uses of one matrix, a bias, and a parameter that only some steps use."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5, dtype=dtype)
        self.norm = nn.LayerNorm(5, dtype=dtype)
        self.sometimes = nn.Parameter(torch.ones(5, dtype=dtype))

    def forward(self, tokens: torch.Tensor, use: bool = True) -> torch.Tensor:
        y = self.norm(self.embed(tokens))
        return (y * self.sometimes if use else y) @ self.embed.weight.T


def made(dtype: torch.dtype) -> tuple[Tied, FlatParameters]:
    torch.manual_seed(0)
    net = Tied(dtype)
    return net, FlatParameters(net.named_parameters(), decays, bucket_elements=60)


TOKENS = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 10]), torch.tensor([0, 0, 7])]


def test_parameters_become_aligned_views_with_their_old_values() -> None:
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in Tied(torch.float32).named_parameters()}
    net, flat = made(torch.float32)
    assert [group.decays for group in flat.groups] == [True, False]
    assert list(flat.groups[1].slots) == ["norm.bias", "norm.weight", "sometimes"]  # reverse order of registration
    for group in flat.groups:
        for name, slot in group.slots.items():
            parameter = net.get_parameter(name)
            assert torch.equal(parameter, before[name])
            assert slot.start % ALIGNMENT == 0
            assert parameter.data_ptr() == group.param.data_ptr() + slot.start * parameter.element_size()
    assert sum(len(group.slots) for group in flat.groups) == len(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_micro_batches_are_added_up_in_fp32(dtype: torch.dtype) -> None:
    net, flat = made(dtype)
    torch.manual_seed(0)
    plain = Tied(dtype)
    for step in range(2):  # the second step must not see the first one's gradients
        flat.begin_step()
        expected: dict[str, torch.Tensor] = {}
        for tokens in TOKENS[step:]:
            net(tokens).float().square().sum().backward()
            plain.zero_grad()
            plain(tokens).float().square().sum().backward()
            for name, p in plain.named_parameters():
                expected[name] = expected.get(name, 0) + p.grad.float()
        flat.finish_step()
        for name, grad in flat.named(lambda group: group.grad).items():
            assert grad.dtype == torch.float32
            assert torch.equal(grad, expected[name]), name
        assert all(p.grad is None for p in net.parameters()), "a second set of gradients is kept alive"


@pytest.mark.parametrize("native", [False, True], ids=["through-hooks", "into-sinks"])
def test_a_bf16_sum_is_rounded_once_an_addition(native: bool) -> None:
    """The sum of k micro-batches is off by at most 2^-9 of each of its k partial sums: no addition rounds twice."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(33, 20, dtype=torch.bfloat16))
    ops = kernels.choose("cpu", {"linear": "native" if native else "torch"}, torch.bfloat16)
    flat = FlatParameters([("weight", weight)], decays, grad_dtype=torch.bfloat16)
    assert [group.grad.dtype for group in flat.groups] == [torch.bfloat16]
    flat.begin_step()
    exact = torch.zeros(33, 20, dtype=torch.float64)
    bound = torch.zeros(33, 20, dtype=torch.float64)
    for _ in range(16):
        x, dy = torch.randn(7, 20, dtype=torch.bfloat16), torch.randn(7, 33, dtype=torch.bfloat16)
        ops.linear(x, weight).backward(dy)
        part = dy.double().T @ x.double()
        exact += part
        # The partial sum that is rounded is off by what was before; autograd's bf16 part is rounded by itself.
        bound += 2.0**-9 * (exact.abs() + bound + (0 if native else part.abs())) + 1e-5
    flat.finish_step()
    total = flat.named(lambda group: group.grad)["weight"]
    assert ((total.double() - exact).abs() <= bound).all()


def test_a_parameter_without_a_gradient_in_this_step_has_zero() -> None:
    net, flat = made(torch.float32)
    for use in (True, False):
        flat.begin_step()
        net(TOKENS[0], use).square().sum().backward()
        flat.finish_step()
        assert flat.named(lambda group: group.grad)["sometimes"].any() == use


def test_master_weights_alias_fp32_parameters_and_copy_bf16_ones() -> None:
    for group in made(torch.float32)[1].groups:
        assert group.master is group.param
        assert all(piece.master is piece.param for piece in group.pieces()), "an op would take them for two tensors"
    for group in made(torch.bfloat16)[1].groups:
        assert group.master.dtype == torch.float32
        assert torch.equal(group.master, group.param.float())


@pytest.mark.parametrize("bucket_elements", [1, 70, 10**9])
def test_buckets_cut_the_buffer_at_parameters_without_gaps(bucket_elements: int) -> None:
    net = nn.Sequential(*(nn.Linear(9, 5) for _ in range(6)))
    flat = FlatParameters(net.named_parameters(), decays, bucket_elements)
    for group in flat.groups:
        assert group.buckets[0].start == 0 and group.buckets[-1].stop == group.param.numel()
        assert all(a.stop == b.start for a, b in zip(group.buckets, group.buckets[1:], strict=False))
        assert [name for bucket in group.buckets for name in bucket.names] == list(group.slots)
        assert all(bucket.stop - bucket.start >= bucket_elements for bucket in group.buckets[:-1])


def test_parameters_of_two_dtypes_cannot_share_a_buffer() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="share dtype"):
        FlatParameters(net.named_parameters(), decays)
