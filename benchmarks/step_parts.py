"""Where a step of megapre goes: milliseconds by part, from torch's profiler.

An operation belongs to the part that the innermost name around it tells: its own (`aten::mm`, `megapre::linear_`),
that of what called it, up to the op of megapre.kernels that it was called for (`op:rope`). In the backward the way up
ends at an autograd node; its sequence number names the operation of the forward that made it, whose part it takes. What
is left is the copies, casts and additions of the model itself, and what the profiler does not see: Python and autograd.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "products: forward", "input gradient", "weight gradient"
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (WEIGHT_GRADIENT, ("linear_weight_gradient",)),
    (INPUT_GRADIENT, ("linear_input_gradient",)),
    (FORWARD, ("megapre::linear_", "megapre::linear")),
    ("loss", ("op:linear_cross_entropy", "op:cross_entropy", "megapre::cross_entropy", "megapre::linear_cross")),
    ("attention", ("op:attention", "scaled_dot_product", "megapre::attention", "scaleddotproduct")),
    ("norms", ("op:layer_norm", "op:rms_norm", "layer_norm", "rms_norm", "layernorm", "rmsnorm")),
    ("activations", ("op:gelu", "op:swiglu", "op:geglu", "::gelu", "::swiglu", "::geglu", "::silu")),
    ("rope", ("op:rope", "::rope")),
    ("embedding", ("op:embedding", "::embedding", "embedding_dense_backward", "embeddingbackward")),
    ("gradient accumulation", ("accumulategrad",)),
    ("grad norm", ("op:grad_norm", "::grad_norm")),
    ("optimizer", ("op:adamw_", "::adamw_", "_fused_adamw_")),
)
MOVES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::cat")
COPIES, REST = "copies", "rest"
# What a product is called by torch; which of the three it is, its shapes tell.
PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "aten::mkldnn_linear")
NAMES = (*dict.fromkeys([FORWARD, INPUT_GRADIENT, *(part for part, _ in PARTS)]), COPIES, REST)


def where_it_goes(step: Callable[[Any], Any], lines: list[Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by part, the mean over `lines`: on CUDA the time of kernels, else of operators."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        begin = time.perf_counter()
        for line in lines:
            step(line)
        if cuda:
            torch.cuda.synchronize()
        whole = (time.perf_counter() - begin) * 1e3 / len(lines)
    events = list(profiler.events())
    rows = lines[0].shape[0] * (lines[0].shape[1] - 1)
    made_by = {
        event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not in_backward(event)
    }  # of several with one number, the innermost comes last
    spent = dict.fromkeys(NAMES, 0.0)
    for event in events:
        micro = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micro:
            spent[part_of(event, made_by, rows)] += micro / 1e3 / len(lines)
    if not cuda:
        spent[REST] += max(whole - sum(spent.values()), 0.0)
    return spent


def part_of(event: Any, made_by: dict[int, Any], rows: int) -> str:
    """One of NAMES. `made_by`: the forward operation of each sequence number; `rows`: tokens of a step."""
    for around in upwards(event):
        if around.name in PRODUCTS:
            return product(around, rows)
        if part := by_name(around.name):
            return part
    outermost = [around for around in upwards(event) if around.name.startswith("autograd::engine")]
    forward = made_by.get(outermost[-1].sequence_nr) if outermost else None
    for around in upwards(forward):
        if part := by_name(around.name):
            return part
    return COPIES if any(around.name in MOVES for around in upwards(event)) else REST


def by_name(name: str) -> str:
    name = name.lower()
    return next((part for part, words in PARTS if any(word in name for word in words)), "")


def product(event: Any, rows: int) -> str:
    """Which of a linear layer's three products it is, [m, k] x [k, n].

    The weight gradient sums over rows, of a step or of a chunk of the loss; the other two sum over features. The loss
    makes its input gradient in the forward: it sums over the vocabulary, far more than it keeps.
    """
    a, b = [shape for shape in event.input_shapes if len(shape) >= 2][:2]
    if is_rows(a[-1], rows) and not is_rows(a[0], rows):
        return WEIGHT_GRADIENT
    return INPUT_GRADIENT if in_backward(event) or a[-1] > 8 * b[-1] else FORWARD


def is_rows(size: int, rows: int) -> bool:
    """Whether `size` may be tokens, all or a chunk of 128 and more: no width of the shapes here divides them."""
    return size == rows or (size >= 128 and rows % size == 0)


def in_backward(event: Any) -> bool:
    return any(around.name.startswith("autograd::engine") for around in upwards(event))


def upwards(event: Any) -> Iterator[Any]:
    """The event and what it was called from, innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent
