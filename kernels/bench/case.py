"""A case: an op at one size, its inputs and its providers; and what the builders of cases share.

A provider is a function of the case's leaves that returns the outputs; forward and backward are taken from it through
autograd, so that every provider is measured in the same way. Work in place, and ops without a gradient, are a function
without arguments whose only mode is "step".

A peer is what one would use without this package: `torch` (eager, plainly written), `compile` (torch.compile of the
same), and on CUDA SDPA's backends, flex_attention and Liger where they are there.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..cost import cost
from ..triton import ops as triton

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
Sizes = Mapping[str, int]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PEERS = ("torch", "compile", "fused_fp32", "cudnn", "flash", "efficient", "flex", "liger", "unsharded")
"""Providers that are not implementations of the op, whatever op they serve."""

EPS, IGNORE = 1e-6, -100
MODES = ("forward", "backward", "full", "step")
"""forward: without gradients; backward: of a kept graph; full: both, as in training; step: in place, or no gradient."""


class Provider(NamedTuple):
    """A function of a case's leaves. `why_not` is empty when it can run here; `peer`: not this package's own."""

    function: Function
    why_not: str
    peer: bool


@dataclass
class Case:
    """One op at one size. `work` maps modes to (FLOPs, bytes), `bound` is the ceiling: "copy" or "product"."""

    op: str
    sizes: dict[str, int]
    dtype: str
    device: str
    bound: str
    work: dict[str, tuple[int, int]]
    adapt: Callable[[Function], Function]  # an implementation of the registry -> a function of the leaves
    plain: Callable[[Wrap], Function] | None = None  # the peer in plain torch; the argument is called on what compiles
    leaves: list[Tensor] = field(default_factory=list)
    upstream: list[Tensor] = field(default_factory=list)
    peers: dict[str, Function] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None  # before every call, not timed
    tolerance: float = (
        0.25  # ||a - b|| / ||b||: who is further off computes something else (how exact they are, tests say)
    )

    @property
    def shape(self) -> str:
        """The sizes as the command line takes them: T=2048,H=4096."""
        return ",".join(f"{name}={size}" for name, size in self.sizes.items())

    def providers(self) -> dict[str, Provider]:
        """Every provider by name: implementations in order of preference, then peers."""
        found = {}
        for row in implementations(self.op):
            found[row.name] = Provider(self.adapt(row.function), row.why_not(self.device), row.name in PEERS)
        if self.plain is not None:
            if "torch" not in found:
                found["torch"] = Provider(self.plain(lambda function: function), "", True)
            found["compile"] = Provider(self.plain(compiled), "", True)
        found.update({name: Provider(function, "", True) for name, function in self.peers.items()})
        return found


def compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


def implementations(op: str) -> list[registry.Implementation]:
    """The registry's rows of `op`; for a form in place that it does not list, the registered torch ops."""
    rows = [row for row in registry.IMPLEMENTATIONS if row.op == op]
    if rows or op not in IN_PLACE:
        return rows
    return [registry.Implementation(op, name, function, why_not) for name, function, why_not in IN_PLACE[op]]


def _native_cross_entropy_(*arguments: Any) -> Tensor:
    return torch.ops.megapre.cross_entropy_(*arguments)  # type: ignore[no-any-return]


def _triton_cross_entropy_(*arguments: Any) -> Tensor:
    module = importlib.import_module("..triton.cross_entropy", __package__)
    return module.forward_in_place(*arguments)  # type: ignore[no-any-return]


IN_PLACE: dict[str, list[tuple[str, Function, Callable[[str], str]]]] = {
    "cross_entropy_": [
        ("native", _native_cross_entropy_, registry._needs_native("cross_entropy_")),
        ("triton", _triton_cross_entropy_, triton.why_not),
    ],
}


def randn(shape: tuple[int, ...], dtype: str, device: str, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device).mul_(scale).to(DTYPES[dtype])


def twice(op: str, sizes: Sizes, dtype: str) -> dict[str, tuple[int, int]]:
    """Work of an op with a backward, by cost.py; full is the sum."""
    forward, backward = cost(op, sizes, dtype), cost(f"{op}_backward", sizes, dtype)
    full = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, "full": full}


def take(sizes: Sizes, *names: str, **defaults: int) -> dict[str, int]:
    """The sizes that an op has; optional ones only where they are not 0."""
    optional = {name: sizes.get(name, default) for name, default in defaults.items()}
    return {**{name: sizes[name] for name in names}, **{name: size for name, size in optional.items() if size}}


def liger_function(device: str, module: str, name: str) -> Any:
    """A Liger autograd function; None off CUDA, and where the package is not there or broken."""
    if device == "cpu":
        return None
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    except Exception:  # a broken peer is a missing peer
        return None


def refill(targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
    def prepare() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return prepare


def distance(got: Tensor, known: Tensor) -> float:
    """||got - known|| / ||known||; infinite where shapes differ or got holds NaN, which no maximum may lose."""
    if got.shape != known.shape:
        return math.inf
    wide = known.double()
    error = float((got.double() - wide).norm() / wide.norm().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error
