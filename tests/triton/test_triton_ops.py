"""The ops as torch sees them: schema, fake tensors, autograd, torch.compile, and capture in a CUDA graph."""

import pytest
import torch
from torch import Tensor

from megapre.kernels.triton import ops

OPS = torch.ops.megapre_triton


def cases(device: str) -> dict[str, tuple[object, ...]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_(grad)

    labels = torch.tensor([1, -100, 5], device=device)
    settings = (-100, 0.1, 1e-3, 7)
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)

    def state() -> list[Tensor]:  # master, both moments, gradient
        return [randn(9, grad=False).abs() for _ in range(4)]

    scalars = torch.tensor(1e-3, device=device), torch.tensor(2.0, device=device)  # lr, step
    q, k = randn(1, 5, 2, 16), randn(1, 5, 1, 16)
    tables = randn(5, 8, grad=False), randn(5, 8, grad=False)
    return {
        "norm": (randn(3, 8), randn(8), randn(8), 1e-5, randn(3, 8), True),
        "norm without": (randn(3, 8), randn(8), None, 1e-5, None, False),
        "rope": (q, k, *tables, None, False, False),
        "gelu": (randn(3, 8), randn(8), ops.GELU_TANH),
        "gated": (randn(3, 8), ops.SILU),
        "cross_entropy": (randn(3, 8), labels, *settings),
        "linear_cross_entropy": (randn(3, 4), randn(8, 4), labels, *settings, True, True),
        "attention": (q, k, randn(1, 5, 1, 16), True, cu_seqlens, 4, 0.25),
        "adamw_": (randn(9, grad=False).bfloat16(), *state(), *scalars, None, None, 0.9, 0.95, 1e-8, 0.1),
        "adamw_ of an fp32 parameter": (None, *state(), *scalars, scalars[1], scalars[0], 0.9, 0.95, 1e-8, 0.1),
        "adamw_stochastic_": (
            *(t.bfloat16() for t in state()), *scalars, scalars[1], None, 0.9, 0.95, 1e-8, 0.1, 2**63 - 1, 2**40,
        ),
        "cross_entropy_local": (randn(3, 8, grad=False), labels, 4, 9, -100, True),
        "cross_entropy_merge": (randn(2, 3, 4, grad=False).abs(), labels, 9, -100, 0.1, 1e-3),
        "cross_entropy_local_backward_": (
            randn(3, 8, grad=False), labels, randn(3, grad=False), None, 4, 9, -100, 0.1, 1e-3,
        ),
        "grad_norm": ([randn(9, grad=False), randn(3, 4, grad=False)],),
    }  # fmt: skip


@pytest.mark.parametrize("name", [*cases("cpu")])
def test_opcheck(device: str, name: str) -> None:
    torch.library.opcheck(getattr(OPS, name.split()[0]).default, cases(device)[name])


def test_opcheck_of_kept_logits(device: str) -> None:
    """Its backward uses up what the forward kept, which opcheck's repeated backward would not forgive."""
    x, weight = torch.randn(3, 4, device=device, requires_grad=True), torch.randn(8, 4, device=device)
    labels = torch.tensor([1, -100, 5], device=device)
    arguments = (x, weight, labels, -100, 0.1, 1e-3, 7)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.linear_cross_entropy_kept.default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_as_eager(device: str, backend: str) -> None:
    """A small model through every op: the compiled one gives the same loss and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8,), (8, 24), (16,), (8, 12), (10, 8)]
    weights = [torch.randn(s, generator=generator).to(device) for s in shapes]
    x = torch.randn(1, 5, 8, generator=generator).to(device)
    labels = torch.tensor([1, 2, -100, 4, 9], device=device)
    cos = torch.ones(5, 4, device=device)

    def loss(x: Tensor, norm: Tensor, qkv: Tensor, bias: Tensor, up: Tensor, head: Tensor) -> Tensor:
        y, h = ops.rms_norm(x, norm, 1e-6, x)
        q, k, v = (y @ qkv).view(1, 5, 3, 1, 8).unbind(2)
        q, k = ops.rope(q, k, cos, cos)
        o = ops.attention(q, k, v, window=3)
        assert isinstance(o, Tensor)
        y, h = ops.layer_norm(o.flatten(2), norm, None, 1e-5, h)
        y = ops.gelu(torch.cat([y, y], -1), bias)[..., :8]
        h = h + torch.nn.functional.pad(ops.swiglu(y @ up), (0, 2)) + ops.geglu(torch.cat([y, y], -1))
        return ops.linear_cross_entropy(h[0], head, labels)

    results = []
    for function in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value / 4, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_capture_in_a_cuda_graph(device: str) -> None:
    """Forward, backward, norm and step replay with new inputs and a new learning rate: nothing waited for the host."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    x = torch.randn(64, 256, device=device)
    labels = torch.randint(0, 512, (64,), device=device)
    master = torch.randn(512 * 256, device=device) * 0.05
    moments = torch.zeros_like(master), torch.zeros_like(master)
    lr, step = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)

    def train() -> Tensor:
        weight = master.view(512, 256).detach().requires_grad_()
        value = ops.linear_cross_entropy(ops.rms_norm(x, torch.ones(256, device=device)), weight, labels)
        (grad,) = torch.autograd.grad(value, weight)
        norm = ops.grad_norm([grad])
        ops.adamw_(
            master, master, *moments, grad.flatten(), lr=lr, step=step, beta1=0.9, beta2=0.95, eps=1e-8,
            weight_decay=0.0, grad_scale=1.0 / norm,
        )  # fmt: skip
        return value.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train()
    torch.cuda.current_stream().wait_stream(stream)
    before = master.clone()
    for t in moments:
        t.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = train()
    lr.fill_(0.01)
    losses = []
    for at in range(5):
        step.fill_(at + 1.0)
        graph.replay()
        losses.append(float(value))
    assert not torch.equal(master, before)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
