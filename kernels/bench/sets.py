"""Named lists of cases.

`targets`: the sizes and the least speedups that the CPU kernels are held to. `gpu-quick`: what the kernels are held to
on a GPU, a size for each, the quick ones first; `gpu`: all sizes of those, then the other ops. A run may be cut off.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .row import Goal, Goals

NO_GOALS: Goals = {}


class Entry(NamedTuple):
    """A case of a set. The rows of `goals` are held to them."""

    op: str
    sizes: Mapping[str, int]
    dtype: str = "bf16"
    goals: Goals = NO_GOALS


def times(provider: str, **least: float) -> Goals:
    """By mode, how many times as fast as the provider."""
    return {mode: (Goal(factor, provider),) for mode, factor in least.items()}


TARGETS = (
    Entry("rms_norm", {"T": 2048, "H": 4096}, goals=times("torch", forward=8.0, backward=15.0)),
    Entry("layer_norm", {"T": 4096, "H": 2048}, goals=times("torch", forward=1.2, backward=2.0)),
    Entry("cross_entropy_", {"T": 1024, "V": 50304, "pad": 47}, goals=times("torch", step=5.0)),
    Entry("linear_cross_entropy", {"T": 2048, "H": 768, "V": 50304}, goals=times("torch", full=1.8)),
    Entry(
        "vocab_parallel_linear_cross_entropy",
        {"T": 2048, "H": 768, "V": 50304},
        goals=times("unsharded", full=0.97),
    ),
    Entry("adamw_", {"P": 55_000_000}, goals=times("fused_fp32", step=1.0)),
    Entry("swiglu", {"T": 2048, "F": 2816}, goals=times("torch", forward=6.0, backward=6.0)),
    Entry("rope", {"T": 2048, "N": 16, "K": 16, "D": 128}, goals=times("torch", forward=15.0)),
    Entry(
        "attention",
        {"B": 2, "S": 1024, "N": 12, "K": 12, "D": 64},
        goals=times("torch", forward=1.3, backward=2.0),
    ),
    Entry(
        "attention",
        {"B": 2, "S": 1024, "N": 12, "K": 12, "D": 64, "documents": 4},
        goals=times("torch", forward=3.0, backward=3.0),
    ),
)

_90 = (Goal(90, "%"),)
_NORM_BACKWARD = (Goal(3600, "GB/s"), Goal(2, "torch"))
LAYER_NORM: Goals = {"backward": _NORM_BACKWARD}
RMS_NORM: Goals = {"forward": _90, "backward": _NORM_BACKWARD}
LEVEL = Goal(0.97, "best peer")  # as fast, but for what times scatter
DENSE: Goals = {"forward": (LEVEL, Goal(0.8, "cudnn", held="cuda")), "backward": (LEVEL,)}
DOCUMENTS: Goals = {"forward": (Goal(1, "best peer"),), "backward": (Goal(1, "best peer"),)}
HEADS = {"N": 64, "K": 8, "D": 128}

GPU_QUICK = (
    Entry("rms_norm", {"T": 8192, "H": 4096}, goals=RMS_NORM),
    Entry("layer_norm", {"T": 1024, "H": 12288}, goals=LAYER_NORM),
    Entry("cross_entropy_", {"T": 8192, "V": 131072}, goals={"step": (Goal(85, "%"),)}),
    Entry("vocab_parallel_cross_entropy_", {"T": 8192, "V": 131072}, goals={"step": (Goal(2.0, "ms"),)}),
    Entry("swiglu", {"T": 8192, "F": 14336}, goals={"forward": _90, "backward": _90}),
    Entry("rope_", {"B": 4, "S": 2048, "N": 32, "K": 8, "D": 128}, goals={"step": _90}),
    Entry("rope", {"B": 4, "S": 2048, "N": 32, "K": 8, "D": 128}, goals={"forward": _90, "backward": _90}),
    Entry("adamw_", {"P": 250_000_000, "grad_bytes": 2}, goals={"step": _90}),
    Entry("grad_norm", {"P": 500_000_000}, "fp32", goals={"step": _90}),
    Entry("linear_cross_entropy", {"T": 4096, "H": 4096, "V": 128256, "sink": 1}, goals={"full": (Goal(17.5, "ms"),)}),
    Entry("attention", {"B": 2, "S": 8192, **HEADS, "documents": 8}, goals=DOCUMENTS),
    Entry("attention", {"B": 2, "S": 8192, **HEADS}, goals=DENSE),
)
GPU = (
    *GPU_QUICK,
    Entry("rms_norm", {"T": 8192, "H": 8192}, goals=RMS_NORM),
    Entry("rms_norm", {"T": 16384, "H": 4096}, goals=RMS_NORM),
    Entry("attention", {"B": 8, "S": 2048, **HEADS}, goals=DENSE),
    Entry("attention", {"B": 4, "S": 4096, **HEADS}, goals=DENSE),
    Entry("attention", {"B": 1, "S": 16384, **HEADS}, goals=DENSE),
    Entry("vocab_parallel_cross_entropy_", {"T": 8192, "V": 65536}),
    Entry("vocab_parallel_cross_entropy_", {"T": 8192, "V": 32768}),
    Entry("rms_norm", {"T": 8192, "H": 4096, "residual": 1}, goals=RMS_NORM),
    Entry("linear_cross_entropy", {"T": 16384, "H": 768, "V": 50304}),
    Entry("attention", {"B": 16, "S": 1024, "N": 12, "K": 12, "D": 64}, goals=DENSE),
    Entry("layer_norm", {"T": 16384, "H": 768}, goals=LAYER_NORM),
    Entry("layer_norm", {"T": 8192, "H": 4096}, goals=LAYER_NORM),
    Entry("gelu", {"T": 16384, "F": 3072}),
    Entry("geglu", {"T": 8192, "F": 14336}),
    Entry("cross_entropy", {"T": 16384, "V": 50304, "pad": 47}),
    Entry("embedding", {"T": 16384, "V": 50304, "H": 768}),
    Entry("linear", {"T": 8192, "I": 4096, "O": 14336}),
    Entry("adamw_stochastic_", {"P": 250_000_000}),
    Entry("vocab_parallel_linear_cross_entropy", {"T": 4096, "H": 4096, "V": 32064}),
)
SETS: dict[str, tuple[Entry, ...]] = {"targets": TARGETS, "gpu": GPU, "gpu-quick": GPU_QUICK}
OF_GPU = ("gpu", "gpu-quick")
"""Sets whose sizes and goals mean nothing on a CPU."""

MOST_LOGITS = 1 << 26
MOST_PARAMETERS = 1 << 25


def of_sizes(op: str, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The cases of `op` in a model of these sizes, each a variant that training meets.

    Logits and parameters are cut to a size at which the rate no longer depends on it.
    """
    sizes = dict(sizes)
    if op in ("layer_norm", "rms_norm"):
        yield sizes
        yield {**sizes, "residual": 1}
    elif op in ("cross_entropy", "cross_entropy_", "vocab_parallel_cross_entropy_"):
        yield {**sizes, "T": max(min(sizes["T"], MOST_LOGITS // sizes["V"]), 1)}
    elif op == "attention":
        yield sizes
        yield {**sizes, "documents": min(4, sizes["S"])}
        yield {**sizes, "window": max(sizes["S"] // 4, 1)}
    elif op == "linear":
        heads, gate = sizes["N"] * sizes["D"], 1 + sizes.get("gated", 0)
        key_heads = sizes["K"] * sizes["D"]
        for ins, outs in (
            (sizes["H"], heads + 2 * key_heads),
            (heads, sizes["H"]),
            (sizes["H"], gate * sizes["F"]),
            (sizes["F"], sizes["H"]),
        ):
            yield {**sizes, "I": ins, "O": outs}
    elif op in ("adamw_", "adamw_stochastic_", "grad_norm"):
        yield {**sizes, "P": min(sizes["P"], MOST_PARAMETERS)}
    else:
        yield sizes
