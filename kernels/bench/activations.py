"""gelu, swiglu and geglu."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import Case, Function, Sizes, liger_function, randn, take, twice


def gelu(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = take(sizes, "T", "F")
    leaves = [randn((sizes["T"], sizes["F"]), dtype, device), randn((sizes["F"],), dtype, device)]

    def own(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    upstream = [torch.randn_like(leaves[0])]
    work = twice("gelu", sizes, dtype)
    return Case("gelu", sizes, dtype, device, "copy", work, lambda f: f, lambda wrap: wrap(own), leaves, upstream)


def _gated(op: str, sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = take(sizes, "T", "F")
    width = sizes["F"]
    x = randn((sizes["T"], 2 * width), dtype, device)

    def own(x: Tensor) -> Tensor:
        gate, up = x[..., :width], x[..., width:]
        return (F.silu(gate) if op == "swiglu" else F.gelu(gate, approximate="tanh")) * up

    peers: dict[str, Function] = {}
    module, name = ("swiglu", "LigerSiLUMulFunction") if op == "swiglu" else ("geglu", "LigerGELUMulFunction")
    if liger := liger_function(device, module, name):
        peers["liger"] = lambda x: liger.apply(x[..., :width], x[..., width:])
    upstream = [randn((sizes["T"], width), dtype, device)]
    work = twice(op, sizes, dtype)
    return Case(op, sizes, dtype, device, "copy", work, lambda f: f, lambda wrap: wrap(own), [x], upstream, peers)


def swiglu(sizes: Sizes, dtype: str, device: str) -> Case:
    return _gated("swiglu", sizes, dtype, device)


def geglu(sizes: Sizes, dtype: str, device: str) -> Case:
    return _gated("geglu", sizes, dtype, device)
