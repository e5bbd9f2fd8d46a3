"""linear and embedding."""

import torch
from torch.nn import functional as F

from .case import Case, Function, Sizes, randn, take, twice


def linear(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = take(sizes, "T", "I", "O", bias=0)
    rows, ins, outs = sizes["T"], sizes["I"], sizes["O"]
    leaves = [randn((rows, ins), dtype, device), randn((outs, ins), dtype, device, scale=ins**-0.5)]
    leaves += [randn((outs,), dtype, device)] * ("bias" in sizes)
    upstream = [randn((rows, outs), dtype, device)]
    work = twice("linear", sizes, dtype)
    return Case(
        "linear", sizes, dtype, device, "product", work, lambda f: f, lambda wrap: wrap(F.linear), leaves, upstream
    )  # fmt: skip


def embedding(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = take(sizes, "T", "V", "H")
    tokens = torch.randint(0, sizes["V"], (sizes["T"],), device=device)
    leaves = [randn((sizes["V"], sizes["H"]), dtype, device)]
    upstream = [randn((sizes["T"], sizes["H"]), dtype, device)]

    def adapt(function: Function) -> Function:
        return lambda weight: function(tokens, weight)

    work = twice("embedding", sizes, dtype)
    return Case(
        "embedding", sizes, dtype, device, "copy", work, adapt, lambda wrap: wrap(lambda w: F.embedding(tokens, w)),
        leaves, upstream,
    )  # fmt: skip
