"""What is measured: for each op the builder of its case, and the sizes it needs.

    case = build("rms_norm", {"T": 2048, "H": 4096}, "bf16", "cpu")
    case.providers()["native"].function(*case.leaves)

Sizes are named as in cost.py. A builder makes the inputs and says how an implementation and a peer are called.
"""

import difflib
from collections.abc import Callable, Iterable

import torch

from .. import registry
from . import activations, attentions, layers, losses, norms, rotations, updates
from .case import DTYPES, IN_PLACE, Case, Sizes


class BenchError(ValueError):
    """An op, size, dtype or provider that there is not; the message names what there is."""


def build(op: str, sizes: Sizes, dtype: str, device: str) -> Case:
    """The case of `op` at these sizes, on the device. Sizes that the op does not have are left aside.

    BenchError as `check`.
    """
    check(op, sizes, dtype)
    registry.choose(device)  # registers the ops
    torch.manual_seed(0)
    return BUILDERS[op](complete(sizes), dtype, device)


def check(op: str, sizes: Sizes, dtype: str) -> None:
    """BenchError when there is no such op or dtype here, when a size is missing, or when sizes do not fit."""
    if op not in ops():
        raise BenchError(f"there is no op {op!r}{meant(op, ops())}; the ops are {', '.join(ops())}")
    if dtype not in DTYPES:
        raise BenchError(f"there is no dtype {dtype!r}{meant(dtype, DTYPES)}; the dtypes are {', '.join(DTYPES)}")
    known = complete(sizes)
    if any(name not in known for name in NEEDS[op]):
        raise BenchError(f"{op} needs the sizes {', '.join(NEEDS[op])}; given are {', '.join(sizes) or 'none'}")
    heads, k_heads = known.get("N", 1), known.get("K", known.get("N", 1))
    if op == "attention" and heads % k_heads:
        raise BenchError(f"attention: N = {heads} query heads are no multiple of K = {k_heads} key heads")
    if op in ("rope", "rope_") and known["D"] % 2:
        raise BenchError(f"{op}: D = {known['D']}; positions turn pairs, so the head dim must be even")
    if op == "attention" and known.get("documents", 0) > known["S"]:
        raise BenchError(f"attention: {known['documents']} documents do not fit a row of {known['S']} tokens")
    if "V" in NEEDS[op] and known.get("pad", 0) >= known["V"]:
        raise BenchError(f"{op}: pad = {known['pad']} leaves none of V = {known['V']} columns")


def complete(sizes: Sizes) -> dict[str, int]:
    """The sizes with what follows from them: T = B S, S = T where there is one row, D = H / N."""
    found = dict(sizes)
    if "T" not in found and "B" in found and "S" in found:
        found["T"] = found["B"] * found["S"]
    if "T" in found:
        found.setdefault("S", found["T"] // found.get("B", 1))
        found.setdefault("B", max(found["T"] // max(found["S"], 1), 1))
    if "D" not in found and "H" in found and "N" in found:
        found["D"] = found["H"] // found["N"]
    return found


def ops() -> tuple[str, ...]:
    """Ops that can be measured: those of the registry, and their forms in place."""
    return tuple(op for op in BUILDERS if op in registry.OPS or op in IN_PLACE)


def meant(word: str, known: Iterable[str]) -> str:
    """ " (did you mean gelu?)" where a known word is close; else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


BUILDERS: dict[str, Callable[[Sizes, str, str], Case]] = {
    "linear": layers.linear,
    "embedding": layers.embedding,
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.rms_norm,
    "rope": rotations.rope,
    "rope_": rotations.rope_,
    "gelu": activations.gelu,
    "swiglu": activations.swiglu,
    "geglu": activations.geglu,
    "cross_entropy": losses.cross_entropy,
    "cross_entropy_": losses.cross_entropy_,
    "vocab_parallel_cross_entropy_": losses.vocab_parallel_cross_entropy_,
    "linear_cross_entropy": losses.linear_cross_entropy,
    "vocab_parallel_linear_cross_entropy": losses.vocab_parallel_linear_cross_entropy,
    "attention": attentions.attention,
    "adamw_": updates.adamw_,
    "adamw_stochastic_": updates.adamw_stochastic_,
    "grad_norm": updates.grad_norm,
}
NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("T", "I", "O"),
    "embedding": ("T", "V", "H"),
    "layer_norm": ("T", "H"),
    "rms_norm": ("T", "H"),
    "rope": ("T", "N", "D"),
    "rope_": ("T", "N", "D"),
    "gelu": ("T", "F"),
    "swiglu": ("T", "F"),
    "geglu": ("T", "F"),
    "cross_entropy": ("T", "V"),
    "cross_entropy_": ("T", "V"),
    "vocab_parallel_cross_entropy_": ("T", "V"),
    "linear_cross_entropy": ("T", "H", "V"),
    "vocab_parallel_linear_cross_entropy": ("T", "H", "V"),
    "attention": ("B", "S", "N", "D"),
    "adamw_": ("P",),
    "adamw_stochastic_": ("P",),
    "grad_norm": ("P",),
}
"""The sizes that each op must be given, or that follow from others (`complete`)."""

LEGEND = {
    "T": "tokens",
    "B": "batch",
    "S": "sequence length",
    "H": "hidden",
    "N": "query heads",
    "K": "key heads",
    "D": "head dim",
    "F": "ffn width",
    "V": "vocabulary",
    "P": "parameters",
    "I": "inputs of linear",
    "O": "outputs of linear",
    "residual": "1: a norm adds one",
    "bias": "1: linear adds one",
    "sink": "1: the weight's gradient goes into an fp32 buffer, as in training",
    "pad": "columns of V that do not exist",
    "documents": "documents in each row",
    "window": "keys that a query sees",
    "grad_bytes": "of a gradient's element: 4 or 2",
}
"""Every size there is."""
