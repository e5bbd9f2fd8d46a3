"""Named lists of cases.

`targets`: the sizes and the least speedups that the CPU kernels are held to. `gpu`: what benchmarks/kernels_gpu.py
measures, in order of importance, for a run may be cut off.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """A case of a set. `goals` maps modes to (provider, how many times as fast as it the op in use must be)."""

    op: str
    sizes: Mapping[str, int]
    dtype: str = "bf16"
    goals: Mapping[str, tuple[str, float]] = {}


TARGETS = (
    Entry("rms_norm", {"T": 2048, "H": 4096}, goals={"forward": ("torch", 8.0), "backward": ("torch", 15.0)}),
    Entry("layer_norm", {"T": 4096, "H": 2048}, goals={"forward": ("torch", 1.2), "backward": ("torch", 2.0)}),
    Entry("cross_entropy_", {"T": 1024, "V": 50304, "pad": 47}, goals={"step": ("torch", 5.0)}),
    Entry("linear_cross_entropy", {"T": 2048, "H": 768, "V": 50304}, goals={"full": ("torch", 1.8)}),
    Entry(
        "vocab_parallel_linear_cross_entropy",
        {"T": 2048, "H": 768, "V": 50304},
        goals={"full": ("unsharded", 0.97)},
    ),
    Entry("adamw_", {"P": 55_000_000}, goals={"step": ("fused_fp32", 1.0)}),
    Entry("swiglu", {"T": 2048, "F": 2816}, goals={"forward": ("torch", 6.0), "backward": ("torch", 6.0)}),
    Entry("rope", {"T": 2048, "N": 16, "K": 16, "D": 128}, goals={"forward": ("torch", 15.0)}),
    Entry(
        "attention",
        {"B": 2, "S": 1024, "N": 12, "K": 12, "D": 64},
        goals={"forward": ("torch", 1.3), "backward": ("torch", 2.0)},
    ),
    Entry(
        "attention",
        {"B": 2, "S": 1024, "N": 12, "K": 12, "D": 64, "documents": 4},
        goals={"forward": ("torch", 3.0), "backward": ("torch", 3.0)},
    ),
)

GPU_QUICK = (
    Entry("rms_norm", {"T": 8192, "H": 4096}),
    Entry("rms_norm", {"T": 8192, "H": 4096, "residual": 1}),
    Entry("layer_norm", {"T": 1024, "H": 12288}),
    Entry("cross_entropy_", {"T": 8192, "V": 131072}),
    Entry("linear_cross_entropy", {"T": 4096, "H": 4096, "V": 128256}),
    Entry("attention", {"B": 2, "S": 8192, "N": 64, "K": 8, "D": 128, "documents": 8}),
    Entry("attention", {"B": 2, "S": 8192, "N": 64, "K": 8, "D": 128}),
    Entry("swiglu", {"T": 8192, "F": 14336}),
    Entry("rope", {"T": 8192, "N": 32, "K": 8, "D": 128}),
    Entry("adamw_", {"P": 250_000_000, "grad_bytes": 2}),
    Entry("grad_norm", {"P": 500_000_000}, "fp32"),
)
GPU = (
    *GPU_QUICK,
    Entry("attention", {"B": 8, "S": 2048, "N": 64, "K": 8, "D": 128}),
    Entry("attention", {"B": 4, "S": 4096, "N": 64, "K": 8, "D": 128}),
    Entry("attention", {"B": 16, "S": 1024, "N": 12, "K": 12, "D": 64}),
    Entry("linear_cross_entropy", {"T": 16384, "H": 768, "V": 50304}),
    Entry("layer_norm", {"T": 16384, "H": 768}),
    Entry("rms_norm", {"T": 8192, "H": 8192}),
    Entry("rms_norm", {"T": 16384, "H": 4096}),
    Entry("layer_norm", {"T": 8192, "H": 4096}),
    Entry("gelu", {"T": 16384, "F": 3072}),
    Entry("cross_entropy_", {"T": 16384, "V": 50304}),
    Entry("attention", {"B": 1, "S": 16384, "N": 64, "K": 8, "D": 128}),
)
SETS: dict[str, tuple[Entry, ...]] = {"targets": TARGETS, "gpu": GPU, "gpu-quick": GPU_QUICK}

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
    elif op in ("cross_entropy", "cross_entropy_"):
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
