"""The same model on a GPU: the same start, the same numbers, the same text."""

import pytest
import torch
from torch.testing import assert_close

from megapre import kernels
from megapre.model import Transformer, generate, initialize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_cuda(model, dtype=torch.float32):
    twin = Transformer(model.cfg, kernels.choose("cuda"), dtype=dtype, device="cuda")
    initialize(twin, 1)
    return twin


def where(masked):
    if not masked:
        return ()
    cu_seqlens = torch.tensor([0, 5, 16, 32], dtype=torch.int32)
    return torch.cat([torch.arange(5), torch.arange(11), torch.arange(16)]).view(2, 16), cu_seqlens


def test_initial_weights_are_bitwise_those_of_the_cpu(build, shape):
    model = build(shape)
    for p, q in zip(model.parameters(), on_cuda(model).parameters(), strict=True):
        assert torch.equal(p, q.cpu())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_are_those_of_the_cpu(build, shape, tokens, masked, compiled):
    model = build(shape)
    twin = on_cuda(model)
    torch._dynamo.reset()
    loss_of = torch.compile(twin.loss, fullgraph=True, dynamic=False) if compiled else twin.loss
    batch = (tokens(2, 16), tokens(4, 16)[2:], *where(masked))
    want, got = model.loss(*batch), loss_of(*(t.cuda() for t in batch))
    want.backward()
    got.backward()
    assert_close(got.cpu(), want, rtol=1e-5, atol=0)
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad - q[1].grad.cpu()).norm() <= 1e-4 * p.grad.norm(), name


def test_bf16_follows_fp32(build, shape, tokens):
    model = build(shape)
    twin = on_cuda(model, torch.bfloat16)
    batch = (tokens(2, 16), tokens(4, 16)[2:])
    want, got = model.loss(*batch), twin.loss(*(t.cuda() for t in batch))
    want.backward()
    got.backward()
    assert abs(want.item() - got.item()) < 5e-3 * 32
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad - q[1].grad.float().cpu()).norm() <= 0.05 * p.grad.norm(), name


@pytest.mark.parametrize("cached", [True, False])
def test_generates_the_text_of_the_cpu(build, shape, tokens, cached):
    model = build(shape)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    twin = on_cuda(model)
    twin.load_state_dict(model.state_dict())
    texts = [[s.tokens_B for s in generate(m, tokens(2, 5), 20, 0.8, 10, seed=2, cache=cached)] for m in (model, twin)]
    assert torch.equal(torch.stack(texts[0]), torch.stack(texts[1]))
