"""Other launch policies of the Triton kernels, each a provider of its own: `megapre bench kernels OP --policies`.

A policy (block, warps, programs) is one function of a kernel's file; these are the candidates around it, pruned by
arithmetic. The fastest is put into that function by hand, with the figures. Attention has tiles that are measured for
each machine instead (benchmarks/tune_attention.py).
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from .case import Case, Sizes

Given = tuple[int, ...]
THREAD = range(4, 65)  # elements that a thread may hold
MOST_WARPS = 32  # of a block, and of the persistent ones on a multiprocessor


def _tile(columns: int) -> tuple[int, int]:
    """(rows, block): 4096 elements where rows are short."""
    block = 1 << (columns - 1).bit_length()
    return max(4096 // block, 1), block


def norm_forward(sizes: Sizes) -> Iterator[Given]:
    """(rows per program, tile width, warps)."""
    _, block = _tile(sizes["H"])
    for rows in (1, 2, 4) if block < 4096 else (1,):
        for warps in (1, 2, 4, 8, 16, 32):
            if rows * block // (32 * warps) in THREAD:
                yield rows, block, warps


def norm_backward(sizes: Sizes) -> Iterator[Given]:
    """(rows per program and step, tile width, warps, programs per multiprocessor)."""
    rows, block = _tile(sizes["H"])
    for warps in (4, 8, 16, 32):
        for programs in (1, 2, 3, 4):
            if rows * block // (32 * warps) in THREAD and warps * programs <= MOST_WARPS:
                yield rows, block, warps, programs


def cross_entropy(sizes: Sizes) -> Iterator[Given]:
    """(block, elements of one 16-byte load, warps) of 16-bit logits."""
    for warps in (4, 8, 16, 32):
        for each in (8, 16, 32):
            if warps * 32 * each <= 1 << (sizes["V"] - 1).bit_length():
                yield warps * 32 * each, 8, warps


Candidates = Callable[[Sizes], Iterator[Given]]
_NORM = (("norm", "forward_policy", norm_forward), ("norm", "backward_policy", norm_backward))
_CROSS_ENTROPY = (("cross_entropy", "policy", cross_entropy),)
POLICIES: dict[str, tuple[tuple[str, str, Candidates], ...]] = {
    "rms_norm": _NORM,
    "layer_norm": _NORM,
    "cross_entropy": _CROSS_ENTROPY,
    "cross_entropy_": _CROSS_ENTROPY,
    "vocab_parallel_cross_entropy_": _CROSS_ENTROPY,
}


def add(case: Case) -> Case:
    """The case with a provider for each candidate; none where its Triton kernel cannot run, or has 32-bit numbers."""
    triton = case.providers().get("triton")
    if triton is not None and not triton.why_not and case.dtype in ("bf16", "fp16"):
        for module, name, candidates in POLICIES.get(case.op, ()):
            for given in candidates(case.sizes):
                title = f"triton {name} {','.join(map(str, given))}"
                case.variants[title] = triton._replace(within=partial(instead, module, name, given))
    return case


@contextmanager
def instead(module: str, name: str, given: Given) -> Iterator[None]:
    """Inside, the policy `name` of a file of Triton kernels is `given`."""
    loaded = importlib.import_module(f"..triton.{module}", __package__)
    kept = getattr(loaded, name)
    setattr(loaded, name, lambda *_: given)
    try:
        yield
    finally:
        setattr(loaded, name, kept)
