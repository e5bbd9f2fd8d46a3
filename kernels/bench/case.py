"""A case: an op at one size, its inputs and its providers; and what the builders of cases share.

A provider is a function of the case's leaves that returns the outputs; forward and backward are taken from it through
autograd, so that every provider is measured in the same way. Work in place, and ops without a gradient, are a function
without arguments whose only mode is "step".

A peer is what one would use without this package: `torch` (eager, plainly written), `compile` (torch.compile of the
same), and on CUDA SDPA's backends, flex_attention and Liger where they are there.
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry, vocab_parallel
from ..cost import cost
from ..triton import ops as triton
from ..vocab_parallel_linear_cross_entropy import REGISTERED, Halves

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
Sizes = Mapping[str, int]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PEERS = (
    *("torch", "compile", "fused_fp32", "cudnn", "flash", "efficient", "flex", "liger", "unsharded"),
    *("apex", "transformer_engine", "flash_attention_2", "flash_attention_3"),
)
"""Providers that are not this package's own, whatever op they serve."""
COMPILED = ("compile", "flex")
"""Providers that torch.compile makes."""

EPS, IGNORE = 1e-6, -100
MODES = ("forward", "backward", "full", "step")
"""forward: without gradients; backward: of a kept graph; full: both, as in training; step: in place, or no gradient."""


class Provider(NamedTuple):
    """A function of a case's leaves. `why_not` is empty when it can run here; `peer`: not this package's own. It is
    called inside `within()`."""

    function: Function
    why_not: str
    peer: bool
    within: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class Case:
    """One op at one size. `work` maps modes to (FLOPs, bytes), `bound` is the ceiling: "copy" or "product".

    A provider's results are its outputs and, where a mode takes them, the gradients of the leaves. `exact` makes what
    they should be in a wider dtype, of the part that `view` takes from them; None: all of `plain` on wide leaves.
    """

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
    exact: Callable[[], list[Tensor]] | None = None
    view: Callable[[list[Tensor]], list[Tensor]] = field(default=lambda results: results)
    sunk: int | None = None  # the leaf whose gradient its owner wants in an fp32 buffer, as in training
    compiles: bool = True  # whether torch.compile of the peer in plain torch says anything
    variants: dict[str, Provider] = field(default_factory=dict)  # of an implementation (policies.py)

    @property
    def shape(self) -> str:
        """The sizes as the command line takes them: T=2048,H=4096."""
        return ",".join(f"{name}={size}" for name, size in self.sizes.items())

    def providers(self) -> dict[str, Provider]:
        """Every provider by name: implementations in order of preference, variants of them, then peers."""
        found = {}
        for row in implementations(self.op):
            found[row.name] = Provider(self.adapt(row.function), row.why_not(self.device), row.name in PEERS)
        found.update(self.variants)
        if self.plain is not None:
            if "torch" not in found:
                found["torch"] = Provider(self.plain(lambda function: function), "", True)
            if self.compiles:
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


def _native_cross_entropy_(logits: Tensor, labels: Tensor, vocab: int) -> Tensor:
    return torch.ops.megapre.cross_entropy_(logits, labels, None, IGNORE, 0.0, 0.0, vocab)  # type: ignore[no-any-return]


def _triton_cross_entropy_(logits: Tensor, labels: Tensor, vocab: int) -> Tensor:
    module = importlib.import_module("..triton.cross_entropy", __package__)
    return module.forward_in_place(logits, labels, None, IGNORE, 0.0, 0.0, vocab)  # type: ignore[no-any-return]


def _shard(halves: Halves) -> Function:
    """A shard's share of a vocabulary over RANKS: its statistics, the merge with the others', its gradient in place."""

    def losses_(logits: Tensor, labels: Tensor, vocab: int) -> Tensor:
        own = halves.local(logits, labels, 0, vocab, IGNORE, 0.0)
        gathered = own.new_zeros(RANKS, *own.shape)
        gathered[1:, :, 0] = -torch.inf  # the other shards hold nothing
        gathered[0] = own
        losses, lse = halves.merge(gathered, labels, vocab, IGNORE, 0.0, 0.0)
        halves.gradient_(logits, labels, lse, None, 0, vocab, IGNORE, 0.0, 0.0)
        return losses

    return losses_


RANKS = 8
_HALVES = ("cross_entropy_local", "cross_entropy_local_backward_")
_PLAIN = Halves(vocab_parallel.local_reference, vocab_parallel.merge, vocab_parallel.gradient_reference_)
_TRITON = Halves(triton._local, triton._merge, triton._gradient_)
IN_PLACE: dict[str, list[tuple[str, Function, Callable[[str], str]]]] = {
    "cross_entropy_": [
        ("native", _native_cross_entropy_, registry._needs_native("cross_entropy_")),
        ("triton", _triton_cross_entropy_, triton.why_not),
        ("cuda", _native_cross_entropy_, registry._needs_cuda("cross_entropy_")),
    ],
    "vocab_parallel_cross_entropy_": [
        ("native", _shard(REGISTERED), registry._needs_native(*_HALVES)),
        ("triton", _shard(_TRITON), triton.why_not),
        ("cuda", _shard(REGISTERED), registry._needs_cuda(*_HALVES)),
        ("reference", _shard(_PLAIN), registry._nothing),
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
