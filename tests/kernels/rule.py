"""The rule by which a kernel is correct, and the runs it compares.

An implementation may be at most twice as far from fp64 as torch's own composition of the op in the same dtype, plus
a few ulps at the largest value, for on a small sample torch may be exact by luck: one in bf16, where the arithmetic is
in fp32 and the result is rounded once; four in fp32, where every operation rounds. Inputs are of order one, so a sum
that cancels keeps an error of a few fp32 ulps of one: TINY.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

TINY = 4 * torch.finfo(torch.float32).eps

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty returns NaN instead of what happened to be there: a kernel that leaves an output unwritten fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(function: Function, inputs: Sequence[Tensor], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of `function`, and the gradients of its floating inputs for a random upstream gradient."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(seed)
    # Small integers are exact in every dtype, so all runs get the same upstream gradient.
    upstream = [torch.randint(-2, 3, o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    wanted = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, upstream)
    return [o.detach() for o in outputs], list(grads)


def twice(actual: Function, own: Function, inputs: Sequence[Tensor], slack: float = 0.0) -> None:
    """Asserts the rule for outputs and gradients; `own` is torch's composition, run in the inputs' dtype and fp64.

    `slack` is an absolute error allowed beyond the rule; the caller says what owes it.
    """
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    kinds = ["output", "gradient"]
    for kind, got, torchs, exact in zip(kinds, run(actual, inputs), run(own, inputs), run(own, wide), strict=True):
        for at, (g, t, e) in enumerate(zip(got, torchs, exact, strict=True)):
            assert g.shape == e.shape, f"{kind} {at}: shape {tuple(g.shape)}, expected {tuple(e.shape)}"
            close(g, t, e, f"{kind} {at}", slack)


def close(got: Tensor, torchs: Tensor, exact: Tensor, what: str = "result", slack: float = 0.0) -> None:
    """Asserts the rule for one tensor, plus `slack`."""
    if exact.numel() == 0:
        return
    scale = exact.abs().max().item()
    ulps = 1 if torch.finfo(got.dtype).bits == 16 else 4
    allowed = 2.0 * distance(torchs, exact) + ulps * torch.finfo(got.dtype).eps * scale + TINY + slack
    assert distance(got, exact) <= allowed, f"{what}: {distance(got, exact):.3e} from fp64, allowed {allowed:.3e}"


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in fp64; infinite when a holds what b does not: NaN."""
    difference = (a.double() - b.double()).abs()
    return float("inf") if bool(difference.isnan().any()) else difference.max().item()


def alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Asserts that two runs agree but for the order of fp32 sums: a layout may change torch's way through an op."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two runs gave the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def widest(implementation: str, op: str = "") -> torch.dtype:
    """The widest dtype an implementation takes: those for GPUs and native attention compute in fp32, no fp64."""
    narrow = "triton" in implementation or implementation in ("cuda", "liger", "transformer_engine")
    narrow |= (op, implementation) == ("attention", "native")
    return torch.float32 if narrow else torch.float64
