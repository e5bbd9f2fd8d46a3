"""The ops of this package that torch sees as its own: `torch.ops.megapre.*`.

An op is registered when torch cannot look through it: it has a native kernel, works in place or loops over chunks, or
it has a backward of its own that keeps less than autograd would. The rest are compositions of aten ops, whose fake
tensors, autograd and torch.compile support come with torch.

The C++ library, when it is there, defines its schemas and CPU kernels, and a second one adds CUDA kernels; Python adds
a kernel in plain torch for every other device, the fake tensor function and the autograd formula. When it is not there,
the same schemas are defined here and the plain kernel serves all devices. Registration happens once, on the first
`kernels.choose`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "megapre"


@functools.cache
def register() -> torch.library.Library:
    """Loads the native library if there is one and registers every op. Idempotent; the result keeps the ops alive.

    RuntimeError when another copy of this package has registered its ops in this process.
    """
    from . import (
        adamw,
        attention,
        cross_entropy,
        embedding,
        gelu,
        grad_norm,
        layer_norm,
        linear,
        linear_cross_entropy,
        native,
        rms_norm,
        rope,
        swiglu,
        vocab_parallel,
    )

    native.load()
    native.cuda_status()
    if hasattr(getattr(torch.ops, NAMESPACE), "linear_cross_entropy"):
        raise RuntimeError(f"{__name__}: torch.ops.{NAMESPACE} is registered already by another copy of this package")
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    op_files = (
        layer_norm,
        rms_norm,
        rope,
        gelu,
        swiglu,
        attention,
        cross_entropy,
        embedding,
        vocab_parallel,
        linear,
        linear_cross_entropy,
        adamw,
        grad_norm,
    )
    for op_file in op_files:
        op_file.register(library)
    return library


def add(
    library: torch.library.Library, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any] | None = None
) -> None:
    """Adds one op: its schema unless C++ has defined it, the plain torch kernel, the fake tensor function.

    Without `fake` the kernel itself is run on fake tensors: right when it neither allocates by data nor reads it.
    """
    name = schema.split("(", 1)[0]
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or kernel, lib=library)


def has_native(name: str, device: str) -> bool:
    """Whether C++ has registered a kernel for `name` on `device`."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key))
