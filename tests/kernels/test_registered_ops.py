"""What torch must know of an op: schemas and fake tensors (opcheck), derivatives (gradcheck), compile, autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule import widest
from torch import Tensor

from megapre import kernels
from megapre.kernels import library

SETTINGS = (-100, 0.1, 1e-3, 9)


def labels(device: str) -> Tensor:
    return torch.tensor([3, -100, 8, 0, 5], device=device)


def tables(device: str) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(8.0, device=device), torch.tensor([1.0, 0.1], device=device))
    return angles.cos(), angles.sin()


def update(device: str) -> tuple[Any, ...]:
    """lr, step, grad_scale, found_inf, beta1, beta2, eps and weight_decay of an optimizer op."""
    scalars = (torch.tensor(value, device=device) for value in (0.1, 2.0, 0.5, 0.0))
    return *scalars, 0.9, 0.95, 1e-8, 0.1


Calls = dict[str, list[tuple[Any, ...]]]


class Drawn:
    """Tensors for arguments, of one dtype on one device."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.labels, self.tables = labels(device), tables(device)
        self.documents = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)

    def leaf(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device, requires_grad=True)

    def plain(self, *shape: int) -> Tensor:
        return self.leaf(*shape).detach()


def norms(drawn: Drawn) -> Calls:
    leaf, plain, device = drawn.leaf, drawn.plain, drawn.device
    return {
        "layer_norm": [
            (leaf(5, 12), leaf(12), leaf(12), 1e-5, None),
            (leaf(2, 5, 12), leaf(12), None, 1e-5, leaf(2, 5, 12)),
            (leaf(12, 5).T, leaf(12), leaf(12), 1e-5, None),
            (leaf(0, 12), leaf(12), leaf(12), 1e-5, None),
        ],
        "layer_norm_backward": [
            (
                *(plain(5, 12), dh, plain(5, 12), plain(12), bias),
                *(torch.rand(5, device=device), torch.rand(5, device=device)),
            )
            for dh, bias in ((None, plain(12)), (plain(5, 12), None))
        ],
        "rms_norm": [
            (leaf(5, 12), leaf(12), 1e-6, None),
            (leaf(2, 5, 12), leaf(12), 1e-6, leaf(2, 5, 12)),
            (leaf(12, 5).T, leaf(12), 1e-6, None),
            (leaf(0, 12), leaf(12), 1e-6, None),
        ],
        "rms_norm_backward": [
            (plain(5, 12), dh, plain(5, 12), plain(12), torch.rand(5, device=device)) for dh in (None, plain(5, 12))
        ],
    }


def rotations(drawn: Drawn) -> Calls:
    leaf, plain, device = drawn.leaf, drawn.plain, drawn.device
    places = torch.tensor([[0, 1, 2, 0, 1], [7, 5, 3, 1, 0]], device=device)
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32, device=device)
    return {
        "rope": [
            (leaf(2, 5, 2, 4), leaf(2, 5, 1, 4), *drawn.tables, *where, interleaved, False)
            for where in ((None, None), (places, None), (None, bounds))
            for interleaved in (False, True)
        ],
        "rope_": [(plain(2, 5, 4, 4), 3, *drawn.tables, None, bounds, False)],
        "rope_qkv_backward": [(*(plain(2, 5, n, 4) for n in (2, 1, 1)), *drawn.tables, places, None, True)],
    }


def activations(drawn: Drawn) -> Calls:
    leaf, plain = drawn.leaf, drawn.plain
    return {
        "gelu": [
            *((leaf(5, 12), bias, tanh) for bias in (None, leaf(12)) for tanh in (True, False)),
            (leaf(12, 5).T, leaf(12), True),
            (leaf(0, 12), leaf(12), True),
        ],
        "gelu_backward": [(plain(5, 12), plain(5, 12), bias, True) for bias in (None, plain(12))],
        "swiglu": [(leaf(5, 12),), (leaf(12, 5).T,), (leaf(0, 4),)],
        "swiglu_backward": [(plain(5, 6), plain(5, 12))],
        "geglu": [(leaf(5, 12),), (leaf(2, 3, 4),)],
        "geglu_backward": [(plain(5, 6), plain(5, 12))],
    }


def layers(drawn: Drawn) -> Calls:
    leaf, plain, device = drawn.leaf, drawn.plain, drawn.device
    return {
        "linear": [
            (leaf(2, 3, 8), leaf(5, 8), leaf(5)),
            (leaf(8, 3).T, leaf(8, 5).T, None),
            (leaf(0, 8), leaf(5, 8), None),
        ],
        "linear_backward": [
            (plain(2, 3, 5), plain(2, 3, 8), plain(5, 8), *needs)
            for needs in ((True, True, True), (False, True, False), (True, False, True))
        ],
        "linear_": [(plain(3, 5), plain(3, 8), plain(5, 8), plain(5))],
        "linear_input_gradient_": [(plain(3, 8), plain(3, 5), plain(5, 8))],
        "linear_weight_gradient_": [
            (torch.zeros(5, 8, device=device), sums, plain(3, 5), plain(3, 8), True)
            for sums in (None, torch.zeros(5, device=device))
        ],
        "embedding": [(drawn.labels.clamp(0), leaf(9, 12)), (drawn.labels.clamp(0), leaf(4, 12), 2, 9)],
        "embedding_backward": [
            (plain(5, 12), drawn.labels.clamp(0), 9),
            (plain(5, 12), drawn.labels.clamp(0), 4, 2, 9),
        ],
        "embedding_gradient_": [
            (torch.ones(rows, 12, device=device), plain(5, 12), drawn.labels.clamp(0), accumulate, *shard)
            for accumulate in (True, False)
            for rows, *shard in ((9, 0, None), (4, 2, 9))
        ],
    }


def losses(drawn: Drawn) -> Calls:
    leaf, plain, device = drawn.leaf, drawn.plain, drawn.device
    return {
        "cross_entropy": [(leaf(5, 11), drawn.labels, *SETTINGS), (leaf(11, 5).T, drawn.labels, *SETTINGS)],
        "cross_entropy_backward": [
            (
                torch.randn(5, dtype=torch.float32, device=device),
                plain(5, 11),
                drawn.labels,
                torch.full((5,), 3.0, dtype=torch.float32, device=device),
                *SETTINGS,
            )
        ],
        "cross_entropy_": [
            (plain(5, 11), drawn.labels, weights, *SETTINGS) for weights in (None, torch.rand(5, device=device))
        ],
        "cross_entropy_local": [
            (plain(5, 7), drawn.labels, start, 9, -100, smoothing) for start in (0, 4, 9) for smoothing in (True, False)
        ],
        "cross_entropy_local_backward_": [
            (
                plain(5, 7),
                drawn.labels,
                torch.full((5,), 3.0, dtype=torch.float32, device=device),
                None,
                4,
                9,
                -100,
                0.1,
                1e-3,
            )
        ],
        "linear_cross_entropy": [
            (leaf(5, 6), leaf(11, 6), drawn.labels, *SETTINGS, 2**26, *needs)
            for needs in ((True, True), (True, False), (False, True), (False, False))
        ],
        "linear_cross_entropy_into_": [
            (
                torch.ones(11, 6, device=device),
                plain(5, 6),
                plain(11, 6),
                drawn.labels,
                torch.ones((), device=device),
                True,
                *SETTINGS,
                99,
                need,
            )
            for need in (True, False)
        ],
        "linear_cross_entropy_backward": [
            (torch.tensor(0.5, device=device), plain(5, 6), torch.randn(*shape, device=device), drawn.dtype)
            for shape in ((11, 6), (0,))
        ],
    }


def attentions(drawn: Drawn) -> Calls:
    leaf, plain, device = drawn.leaf, drawn.plain, drawn.device
    return {
        "attention": [
            (leaf(2, 5, 4, 8), leaf(2, 7, 2, 8), leaf(2, 7, 2, 8), True, None, 3, 0.3),
            (*leaf(2, 4, 6, 8).split([2, 2, 2], 2), True, drawn.documents, None, 0.3),
            (leaf(0, 4, 2, 8), leaf(0, 4, 2, 8), leaf(0, 4, 2, 8), False, None, None, 0.3),
        ],
        "attention_backward": [
            (
                *(plain(2, 4, 4, 8), dlse, plain(2, 4, 4, 8)),
                *(plain(2, 4, 2, 8), plain(2, 4, 2, 8), plain(2, 4, 4, 8)),
                *(torch.full((2, 4, 4), 3.0, device=device), True, cuts, None, 0.3),
            )
            for dlse, cuts in ((None, None), (torch.rand(2, 4, 4, device=device), drawn.documents))
        ],
        "attention_backward_": [
            (
                *(torch.empty(2, 4, heads, 8, dtype=drawn.dtype, device=device) for heads in (4, 2, 2)),
                *(plain(2, 4, 4, 8), None, plain(2, 4, 4, 8)),
                *(plain(2, 4, 2, 8), plain(2, 4, 2, 8), plain(2, 4, 4, 8)),
                *(torch.full((2, 4, 4), 3.0, device=device), True, None, None, 0.3),
            )
        ],
    }


def optimizers(drawn: Drawn) -> Calls:
    plain, device = drawn.plain, drawn.device
    return {
        "adamw_": [
            (param, *(torch.rand(5, device=device) for _ in range(3)), plain(5), *update(device))
            for param in (None, plain(5))
        ],
        "adamw_stochastic_": [
            (
                torch.rand(5, device=device).bfloat16(),
                *(torch.rand(5, device=device, dtype=drawn.dtype) for _ in range(2)),
                plain(5),
                *update(device),
                7,
                3,
            )
        ],
        "grad_norm": [([plain(5), plain(2, 3)],), ([plain(3, 2).T],)],
    }


def registered(device: str, dtype: torch.dtype) -> Calls:
    """Arguments for each registered op."""
    kinds = (norms, rotations, activations, layers, losses, attentions, optimizers)
    return {name: calls for kind in kinds for name, calls in kind(Drawn(device, dtype)).items()}


def skip_what_is_refused(device: str, name: str, dtype: torch.dtype) -> None:
    fp32_attention = name.startswith("attention") and dtype == torch.float32
    if device == "cuda" and fp32_attention and library.has_native("attention", device):
        pytest.skip("attention in CUDA C++ takes 16-bit tensors alone")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", registered("cpu", torch.float32))
def test_opcheck(device: str, name: str, dtype: torch.dtype) -> None:
    kernels.choose(device)
    skip_what_is_refused(device, name, dtype)
    for arguments in registered(device, dtype)[name]:
        torch.library.opcheck(getattr(torch.ops.megapre, name), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in registered("cpu", torch.float32) if name.endswith("_")])
def test_what_is_written_gets_a_new_version(device: str, name: str, dtype: torch.dtype) -> None:
    """By it autograd notices a tensor that was saved for a backward and overwritten since."""
    kernels.choose(device)
    skip_what_is_refused(device, name, dtype)
    op = getattr(torch.ops.megapre, name).default
    for arguments in registered(device, dtype)[name]:
        written = {
            argument.name: tensor
            for argument, tensor in zip(op._schema.arguments, arguments, strict=True)
            if argument.is_write and tensor is not None
        }
        before = {argument: tensor._version for argument, tensor in written.items()}
        op(*arguments)
        assert [argument for argument, tensor in written.items() if tensor._version == before[argument]] == []


Call = Callable[[Any], Any]


def calls(device: str) -> dict[str, list[tuple[Call, list[tuple[int, ...]]]]]:
    """For each differentiable op, calls of it and the shapes of their floating inputs."""
    target = labels(device)
    cos, sin = tables(device)
    documents = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    qkv = [(2, 4, 4, 4), (2, 4, 2, 4), (2, 4, 2, 4)]
    return {
        "embedding": [
            (lambda op: lambda w: op(target.clamp(0), w), [(9, 8)]),
            (lambda op: lambda w: op(target.clamp(0), w, 2, 9), [(4, 8)]),
        ],
        "linear": [
            (lambda op: lambda x, w, b: op(x, w, b), [(2, 3, 8), (5, 8), (5,)]),
            (lambda op: lambda x, w: op(x, w), [(3, 8), (5, 8)]),
        ],
        "layer_norm": [
            (lambda op: lambda x, w, b: op(x, w, b), [(3, 8), (8,), (8,)]),
            (lambda op: lambda x, w, b, r: op(x, w, b, 1e-5, r), [(3, 8), (8,), (8,), (3, 8)]),
        ],
        "rms_norm": [
            (lambda op: lambda x, w: op(x, w), [(3, 8), (8,)]),
            (lambda op: lambda x, w, r: op(x, w, 1e-6, r), [(3, 8), (8,), (3, 8)]),
        ],
        "rope": [
            (lambda op: lambda q, k: op(q, k, cos, sin), [(2, 5, 2, 4), (2, 5, 1, 4)]),
            (lambda op: lambda q, k: op(q, k, cos, sin, interleaved=True), [(2, 5, 2, 4), (2, 5, 1, 4)]),
        ],
        # Leaves are not rotated in place, hence the product.
        "rope_": [
            (lambda op: lambda x: op(x * 1, 2, 1, cos, sin), [(2, 4, 4, 4)]),
            (lambda op: lambda x: op(x * 1, 2, 1, cos, sin, cu_seqlens=documents, interleaved=True), [(2, 4, 4, 4)]),
        ],
        "gelu": [
            (lambda op: lambda x, b: op(x, b), [(3, 8), (8,)]),
            (lambda op: lambda x: op(x, None, "none"), [(3, 8)]),
        ],
        "swiglu": [(lambda op: lambda x: op(x), [(3, 8)])],
        "geglu": [(lambda op: lambda x: op(x), [(3, 8)])],
        "cross_entropy": [(lambda op: lambda x: op(x, target, *SETTINGS), [(5, 11)])],
        "linear_cross_entropy": [(lambda op: lambda x, w: op(x, w, target, *SETTINGS), [(5, 6), (11, 6)])],
        "vocab_parallel_linear_cross_entropy": [
            (
                lambda op: lambda x, w: op(x, w, target, lambda stats: stats.unsqueeze(0), 0, 9, -100, 0.1, 1e-3),
                [(5, 6), (11, 6)],
            )
        ],
        "attention": [
            (lambda op: lambda q, k, v: op(q, k, v), qkv),
            (lambda op: lambda q, k, v: op(q, k, v, window=2), qkv),
            (lambda op: lambda q, k, v: op(q, k, v, cu_seqlens=documents), qkv),
            (lambda op: lambda q, k, v: op(q, k, v, return_lse=True), qkv),
        ],
    }


def implementations(device: str, op: str) -> list[tuple[str, Callable[..., Any]]]:
    rows = [row.implementation for row in kernels.table(device) if row.op == op and row.available and not row.takes]
    return [(name, getattr(kernels.choose(device, {op: name}), op)) for name in rows]


@pytest.mark.parametrize("op_name", calls("cpu"))
def test_gradcheck(device: str, op_name: str) -> None:
    for name, op in implementations(device, op_name):
        if widest(name, op_name) != torch.float64:
            continue  # numerical derivatives need fp64; these are held to fp64 references by the rule
        if name == "chunked" and device != "cpu" and library.has_native("cross_entropy_", device):
            continue  # its loop is torch's, but the losses of a chunk are the CUDA kernel's
        for call, shapes in calls(device)[op_name]:
            generator = torch.Generator().manual_seed(1)
            inputs = [torch.randn(s, dtype=torch.float64, generator=generator).to(device) for s in shapes]
            torch.autograd.gradcheck(call(op), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("op_name", calls("cpu"))
def test_compiles_without_graph_breaks(device: str, op_name: str) -> None:
    for _, op in implementations(device, op_name):
        for call, shapes in calls(device)[op_name]:
            torch.compiler.reset()
            eager = call(op)
            compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
            results = []
            for function in (eager, compiled):
                generator = torch.Generator().manual_seed(1)
                inputs = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]
                outputs = function(*inputs)
                outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
                total = torch.stack([(o * o).sum() for o in outputs]).sum()
                results.append([*outputs, *torch.autograd.grad(total, inputs)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_the_chosen_kernels_can_be_used_inside_a_compiled_module(device: str) -> None:
    ops = kernels.choose(device)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ops = ops
            self.weight = torch.nn.Parameter(torch.ones(8, device=device))

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.ops.rms_norm(x, self.weight, 1e-6, residual=x)
            loss: Tensor = self.ops.linear_cross_entropy(y + h, torch.eye(9, 8, device=x.device), labels(device))
            return loss

    block = Block()
    x = torch.randn(5, 8, device=device)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_optimizer_ops_compile(device: str) -> None:
    for name in ("adamw_", "grad_norm"):
        for implementation, _ in implementations(device, name):
            if (name, implementation) == ("adamw_", "torch"):
                continue  # torch's kernel reads lr on the host (CPU), or has no fake form with a tensor lr (CUDA, 2.11)
            op = getattr(kernels.choose(device, {name: implementation}), name)
            scalars = {key: torch.tensor(value, device=device) for key, value in (("lr", 0.1), ("step", 2.0))}

            def call(master: Tensor, grad: Tensor, op: Any = op, name: str = name, scalars: Any = scalars) -> Tensor:
                if name == "grad_norm":
                    return op([master, grad])
                moments = torch.zeros_like(master), torch.ones_like(master)
                op(master, master, *moments, grad, **scalars, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.1)
                return master

            torch.compiler.reset()
            a, b = torch.arange(6.0, device=device), torch.ones(6, device=device)
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(a.clone(), b)
            torch.testing.assert_close(compiled, call(a.clone(), b))


def test_stochastic_optimizer_compiles(device: str) -> None:
    scalars = {key: torch.tensor(value, device=device) for key, value in (("lr", 0.1), ("step", 2.0))}
    for _, op in implementations(device, "adamw_stochastic_"):

        def call(param: Tensor, grad: Tensor, op: Any = op) -> Tensor:
            moments = torch.zeros_like(param), torch.ones_like(param)
            op(param, *moments, grad, **scalars, seed=5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
            return param

        torch.compiler.reset()
        a, b = torch.arange(6.0, device=device).bfloat16(), torch.ones(6, device=device)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(a.clone(), b)
        assert torch.equal(compiled, call(a.clone(), b))


@pytest.mark.parametrize("op_name", calls("cpu"))
def test_autocast_changes_neither_dtypes_nor_values_of_bf16_inputs(device: str, op_name: str) -> None:
    for _, op in implementations(device, op_name):
        for call, shapes in calls(device)[op_name]:
            generator = torch.Generator().manual_seed(1)
            inputs = [torch.randn(s, generator=generator).to(device, torch.bfloat16) for s in shapes]
            plain = call(op)(*inputs)
            with torch.autocast(device, torch.bfloat16):
                cast = call(op)(*inputs)
            for a, b in zip(*((r,) if isinstance(r, Tensor) else r for r in (plain, cast)), strict=True):
                torch.testing.assert_close(a.float(), b.float())


def test_linear_cross_entropy_takes_fp32_weights_beside_bf16_activations(device: str) -> None:
    op = kernels.choose(device).linear_cross_entropy
    x = torch.randn(5, 6, device=device).bfloat16().requires_grad_()
    weight = torch.randn(11, 6, device=device, requires_grad=True)
    loss = op(x, weight, labels(device))
    dx, dweight = torch.autograd.grad(loss, [x, weight])
    assert (loss.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, op(x.detach(), weight.detach().bfloat16(), labels(device)))
