"""Which implementations each op has on this machine, which one is used, and why the others are not.

The preference order per device is data below; measurements of this machine (profile.py) may put another implementation
first. A choice by name is honoured or refused, never replaced.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from . import (
    adamw,
    attention,
    cross_entropy,
    embedding,
    gelu,
    grad_norm,
    layer_norm,
    library,
    linear,
    linear_cross_entropy,
    native,
    profile,
    rms_norm,
    rope,
    swiglu,
    vocab_parallel_linear_cross_entropy,
)
from .third_party import apex, flash_attention, liger, torch_sdpa, transformer_engine
from .triton import ops as triton

Op = Callable[..., Any]


class KernelUnavailable(ValueError):
    """An implementation that does not exist, or not on this machine, was asked for by name."""


def _nothing(device: str) -> str:
    return ""


@dataclass(frozen=True)
class Implementation:
    """One row of the registry: a function that computes an op, and what stands in its way on a device, if anything."""

    op: str
    name: str
    function: Op
    why_not: Callable[[str], str] = _nothing
    takes: str = ""
    """Which calls it takes, where it refuses some of the op's contract: by a ValueError, never by another's hand."""
    serves: str = ""
    """What serves which class of calls, where that depends on the call."""
    note: str = ""
    """What a user should know before choosing it."""


def _needs_native(*ops: str) -> Callable[[str], str]:
    """What stands in the way of a function that calls these C++ kernels of the CPU."""

    def why_not(device: str) -> str:
        if device != "cpu":
            return "native kernels are the CPU's; those in CUDA C++ are called cuda"
        missing = [op for op in ops if not library.has_native(op, device)]
        if not missing:
            return ""
        loaded, reason = native.status()
        return f"the native library has no {missing[0]} for {device}" if loaded else reason

    return why_not


def _needs_cuda(*ops: str) -> Callable[[str], str]:
    """What stands in the way of a function that calls these CUDA C++ kernels."""

    def why_not(device: str) -> str:
        if device != "cuda":
            return "the kernels need a CUDA device, and a build with CUDA (nvcc and a CUDA build of torch)"
        loaded, reason = native.cuda_status()
        if not loaded:
            return reason
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "the kernels need compute capability 8.0"
        missing = [op for op in ops if not library.has_native(op, device)]
        return f"{native.CUDA_LIBRARY.name} has no {missing[0]}; build it again" if missing else ""

    return why_not


def _on_cpu_alone(reason: str) -> Callable[[str], str]:
    return lambda device: "" if device == "cpu" else reason


NOT_RUN = "not yet run on a GPU"
NOT_RUN_SO = "not yet run on a GPU in this form; an older one has"
NOT_RUN_AS_ROW = "not yet run on a GPU as a row; what it calls has"

# In order of preference: the first that can serve a device is its default. What has not run in any form comes after all
# that has.
IMPLEMENTATIONS = (
    Implementation("embedding", "summed", embedding.summed, _on_cpu_alone("torch's own kernel sums in fp32 there")),
    Implementation("embedding", "torch", embedding.torch_embedding),
    Implementation("embedding", "cuda", embedding.summed, _needs_cuda("embedding_gradient_"), note=NOT_RUN),
    Implementation("embedding", "reference", embedding.reference),
    Implementation("linear", "native", linear.native, _needs_native("linear_", "linear_weight_gradient_")),
    Implementation("linear", "torch", linear.torch_linear),
    Implementation("linear", "reference", linear.reference),
    Implementation("layer_norm", "native", layer_norm.native, _needs_native("layer_norm", "layer_norm_backward")),
    Implementation("layer_norm", "triton", triton.layer_norm, triton.why_not),
    Implementation("layer_norm", "torch", layer_norm.fused_torch),
    Implementation("layer_norm", "apex", apex.layer_norm, apex.why_not("fused_layer_norm_cuda", "apex"), note=NOT_RUN),
    Implementation("layer_norm", "liger", liger.layer_norm, liger.why_not, note=NOT_RUN),
    Implementation(
        "layer_norm", "transformer_engine", transformer_engine.layer_norm, transformer_engine.why_not, note=NOT_RUN
    ),
    Implementation(
        "layer_norm", "cuda", layer_norm.native, _needs_cuda("layer_norm", "layer_norm_backward"), note=NOT_RUN
    ),
    Implementation("layer_norm", "reference", layer_norm.reference),
    Implementation("rms_norm", "native", rms_norm.native, _needs_native("rms_norm", "rms_norm_backward")),
    Implementation("rms_norm", "triton", triton.rms_norm, triton.why_not),
    Implementation("rms_norm", "torch", rms_norm.fused_torch),
    Implementation("rms_norm", "apex", apex.rms_norm, apex.why_not("fused_layer_norm_cuda", "apex"), note=NOT_RUN),
    Implementation("rms_norm", "liger", liger.rms_norm, liger.why_not, note=NOT_RUN),
    Implementation(
        "rms_norm", "transformer_engine", transformer_engine.rms_norm, transformer_engine.why_not, note=NOT_RUN
    ),
    Implementation("rms_norm", "cuda", rms_norm.native, _needs_cuda("rms_norm", "rms_norm_backward"), note=NOT_RUN),
    Implementation("rms_norm", "reference", rms_norm.reference),
    Implementation("rope", "native", rope.native, _needs_native("rope")),
    Implementation("rope", "triton", triton.rope, triton.why_not),
    Implementation("rope", "liger", liger.rope, liger.why_not, liger.TAKES_ROPE, note=NOT_RUN),
    Implementation("rope", "cuda", rope.native, _needs_cuda("rope"), note=NOT_RUN),
    Implementation("rope", "reference", rope.reference),
    Implementation("rope_", "native", rope.native_, _needs_native("rope_", "rope_qkv_backward")),
    Implementation("rope_", "triton", triton.rope_, triton.why_not, note=NOT_RUN_SO),
    Implementation("rope_", "cuda", rope.native_, _needs_cuda("rope_", "rope_qkv_backward"), note=NOT_RUN),
    Implementation("rope_", "reference", rope.reference_),
    Implementation("gelu", "native", gelu.native, _needs_native("gelu", "gelu_backward")),
    Implementation("gelu", "triton", triton.gelu, triton.why_not),
    Implementation("gelu", "torch", gelu.fused_torch),
    Implementation("gelu", "cuda", gelu.native, _needs_cuda("gelu", "gelu_backward"), note=NOT_RUN),
    Implementation("gelu", "reference", gelu.reference),
    Implementation("swiglu", "native", swiglu.native, _needs_native("swiglu", "swiglu_backward")),
    Implementation("swiglu", "triton", triton.swiglu, triton.why_not),
    Implementation("swiglu", "torch", swiglu.composed_torch),
    Implementation("swiglu", "liger", liger.swiglu, liger.why_not, note=NOT_RUN),
    Implementation("swiglu", "transformer_engine", transformer_engine.swiglu, transformer_engine.why_not, note=NOT_RUN),
    Implementation("swiglu", "cuda", swiglu.native, _needs_cuda("swiglu", "swiglu_backward"), note=NOT_RUN),
    Implementation("swiglu", "reference", swiglu.reference),
    Implementation("geglu", "native", swiglu.geglu_native, _needs_native("geglu", "geglu_backward")),
    Implementation("geglu", "triton", triton.geglu, triton.why_not),
    Implementation("geglu", "torch", swiglu.geglu_composed_torch),
    Implementation("geglu", "liger", liger.geglu, liger.why_not, note=NOT_RUN),
    Implementation("geglu", "transformer_engine", transformer_engine.geglu, transformer_engine.why_not, note=NOT_RUN),
    Implementation("geglu", "cuda", swiglu.geglu_native, _needs_cuda("geglu", "geglu_backward"), note=NOT_RUN),
    Implementation("geglu", "reference", swiglu.geglu_reference),
    Implementation(
        "cross_entropy", "native", cross_entropy.native, _needs_native("cross_entropy", "cross_entropy_backward")
    ),
    Implementation("cross_entropy", "triton", triton.cross_entropy, triton.why_not, note=NOT_RUN_SO),
    Implementation(
        "cross_entropy",
        "cuda",
        cross_entropy.native,
        _needs_cuda("cross_entropy", "cross_entropy_backward"),
        note=NOT_RUN,
    ),
    Implementation("cross_entropy", "reference", cross_entropy.reference),
    Implementation("linear_cross_entropy", "triton", triton.linear_cross_entropy, triton.why_not, note=NOT_RUN_SO),
    Implementation("linear_cross_entropy", "chunked", linear_cross_entropy.chunked),
    Implementation("linear_cross_entropy", "reference", linear_cross_entropy.reference),
    Implementation(
        "vocab_parallel_linear_cross_entropy",
        "triton",
        triton.vocab_parallel_linear_cross_entropy,
        triton.why_not,
        note=NOT_RUN,
    ),
    Implementation("vocab_parallel_linear_cross_entropy", "chunked", vocab_parallel_linear_cross_entropy.chunked),
    Implementation("vocab_parallel_linear_cross_entropy", "reference", vocab_parallel_linear_cross_entropy.reference),
    Implementation("attention", "native", attention.native, _needs_native("attention", "attention_backward_")),
    Implementation(
        "attention",
        "cudnn_or_triton",
        torch_sdpa.cudnn_or_triton,
        torch_sdpa.why_not_cudnn_or_triton,
        serves="dense: cudnn, or sdpa where that cannot; documents, windows, lse: triton",
        note=NOT_RUN_AS_ROW,
    ),
    Implementation(
        "attention",
        "sdpa_or_triton",
        triton.attention_by_mask,
        triton.why_not,
        serves="dense: sdpa; documents, windows, lse: triton",
        note=NOT_RUN_SO,
    ),
    Implementation("attention", "sdpa", attention.sdpa),
    Implementation("attention", "triton", triton.attention, triton.why_not, note=NOT_RUN_SO),
    Implementation(
        "attention", "cudnn", torch_sdpa.cudnn, torch_sdpa.why_not_cudnn, torch_sdpa.TAKES_CUDNN, note=NOT_RUN_AS_ROW
    ),
    Implementation(
        "attention",
        "flash_attention_3",
        flash_attention.flash_attention_3,
        flash_attention.why_not_3,
        flash_attention.TAKES,
        note=NOT_RUN,
    ),
    Implementation(
        "attention", "flash", torch_sdpa.flash, torch_sdpa.why_not_flash, torch_sdpa.TAKES_FLASH, note=NOT_RUN_AS_ROW
    ),
    Implementation(
        "attention",
        "flash_attention_2",
        flash_attention.flash_attention_2,
        flash_attention.why_not_2,
        flash_attention.TAKES,
        note=NOT_RUN,
    ),
    Implementation(
        "attention",
        "cuda",
        attention.cuda,
        _needs_cuda("attention", "attention_backward_"),
        attention.TAKES_CUDA,
        note=NOT_RUN,
    ),
    Implementation("attention", "reference", attention.reference),
    Implementation("adamw_", "native", adamw.native, _needs_native("adamw_")),
    Implementation("adamw_", "triton", triton.adamw_, triton.why_not, note=NOT_RUN_SO),
    Implementation("adamw_", "torch", adamw.fused_torch),
    Implementation("adamw_", "apex", apex.adamw_, apex.why_not("amp_C"), note=NOT_RUN),
    Implementation("adamw_", "cuda", adamw.native, _needs_cuda("adamw_"), note=NOT_RUN),
    Implementation("adamw_", "reference", adamw.reference),
    Implementation("adamw_stochastic_", "native", adamw.stochastic_native, _needs_native("adamw_stochastic_")),
    Implementation("adamw_stochastic_", "triton", triton.adamw_stochastic_, triton.why_not, note=NOT_RUN),
    Implementation(
        "adamw_stochastic_", "cuda", adamw.stochastic_native, _needs_cuda("adamw_stochastic_"), note=NOT_RUN
    ),
    Implementation("adamw_stochastic_", "reference", adamw.stochastic_reference),
    Implementation("grad_norm", "native", grad_norm.native, _needs_native("grad_norm")),
    Implementation("grad_norm", "triton", triton.grad_norm, triton.why_not),
    Implementation("grad_norm", "apex", apex.grad_norm, apex.why_not("amp_C"), note=NOT_RUN),
    Implementation("grad_norm", "cuda", grad_norm.native, _needs_cuda("grad_norm"), note=NOT_RUN),
    Implementation("grad_norm", "reference", grad_norm.reference),
)


@dataclass(frozen=True)
class Kernels:
    """The chosen implementation of every op, as attributes. Passed to whatever computes; there is no global choice."""

    embedding: Op
    linear: Op
    layer_norm: Op
    rms_norm: Op
    rope: Op
    rope_: Op
    gelu: Op
    swiglu: Op
    geglu: Op
    cross_entropy: Op
    linear_cross_entropy: Op
    vocab_parallel_linear_cross_entropy: Op
    attention: Op
    adamw_: Op
    adamw_stochastic_: Op
    grad_norm: Op
    names: dict[str, str]
    origins: dict[str, str]
    """By op: "preference", "profile" or "config", whichever made the choice."""


OPS = tuple(field.name for field in fields(Kernels) if field.name not in ("names", "origins"))


class Row(NamedTuple):
    """One line of `table`. `why` says of the chosen one what chose it, of others that can run what they are behind, and
    of all what a user should know; `takes` which calls it takes, where not all."""

    op: str
    implementation: str
    available: bool
    why_not: str
    chosen: bool
    why: str
    takes: str = ""


_BEHIND = {
    "preference": "can run; {} is preferred",
    "profile": "can run; {} was measured to be faster",
    "config": "can run; the config names {}",
}


def serves(op: str, name: str) -> str:
    """What serves which class of calls of implementation `name`; empty where it serves all itself."""
    return next(row.serves for row in IMPLEMENTATIONS if (row.op, row.name) == (op, name))


class _Choice(NamedTuple):
    implementation: Implementation
    origin: str
    why: str


def choose(device: str, overrides: Mapping[str, str] | None = None, dtype: torch.dtype | None = None) -> Kernels:
    """The implementation of every op for "cpu" or "cuda" (an index, as in "cuda:0", is allowed).

    `overrides` maps ops to implementation names. `dtype` is that of the model: only what was measured in it counts, and
    everything for None. KernelUnavailable when an override is unknown or cannot run here; the message says what can.
    """
    chosen = _choose(device, overrides or {}, dtype)
    return Kernels(
        **{op: choice.implementation.function for op, choice in chosen.items()},
        names={op: choice.implementation.name for op, choice in chosen.items()},
        origins={op: choice.origin for op, choice in chosen.items()},
    )


def table(device: str, overrides: Mapping[str, str] | None = None, dtype: torch.dtype | None = None) -> list[Row]:
    """Every implementation of every op on `device`: whether it can run, why not, and whether it is the one in use."""
    chosen = _choose(device, overrides or {}, dtype)
    kind = device.split(":")[0]
    rows = []
    for row in sorted(IMPLEMENTATIONS, key=lambda row: OPS.index(row.op)):
        used, why_not = chosen[row.op], row.why_not(kind)
        is_used = row is used.implementation
        why = used.why if is_used else "" if why_not else _BEHIND[used.origin].format(used.implementation.name)
        why = "; ".join(part for part in (why, row.note) if part)
        rows.append(Row(row.op, row.name, not why_not, why_not, is_used, why, row.takes))
    return rows


def _choose(device: str, overrides: Mapping[str, str], dtype: torch.dtype | None) -> dict[str, _Choice]:
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise KernelUnavailable(f"kernels: device is {device!r}; there are implementations for cpu and cuda")
    library.register()
    if not triton.why_not(kind):
        triton.register()
    unknown = sorted(set(overrides) - set(OPS))
    if unknown:
        raise KernelUnavailable(f"kernels: there is no op {', '.join(unknown)}; the ops are {', '.join(OPS)}")
    measured, dtype_name = profile.load(device), profile.DTYPES.get(dtype, "") if dtype else ""
    return {op: _one(op, kind, overrides.get(op), measured, dtype_name) for op in OPS}


def _one(op: str, device: str, name: str | None, measured: profile.Profile, dtype: str) -> _Choice:
    rows = [row for row in IMPLEMENTATIONS if row.op == op]
    usable = [row for row in rows if not row.why_not(device)]
    if name is None:
        whole = [row for row in usable if not row.takes]  # what refuses calls is for those who name it
        best, why = measured.better(op, dtype, whole[0].name, [row.name for row in whole])
        if not why:
            return _Choice(whole[0], "preference", "by preference")
        return _Choice(next(row for row in usable if row.name == best), "profile", f"by profile: {why}")
    for row in rows:
        if row.name == name and row.why_not(device):
            raise KernelUnavailable(
                f"kernels.{op}: {name!r} cannot run on {device}: {row.why_not(device)}; "
                f"available: {', '.join(row.name for row in usable)}"
            )
        if row.name == name:
            return _Choice(row, "config", "by config")
    raise KernelUnavailable(
        f"kernels.{op}: there is no implementation {name!r}; available on {device}: "
        f"{', '.join(row.name for row in usable)}"
    )
