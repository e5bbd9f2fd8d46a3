"""linear and embedding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import Case, Function, Sizes, randn, take, twice
from .exact import ENDS, ends, wider


def linear(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = take(sizes, "T", "I", "O", bias=0)
    rows, ins, outs = sizes["T"], sizes["I"], sizes["O"]
    leaves = [randn((rows, ins), dtype, device), randn((outs, ins), dtype, device, scale=ins**-0.5)]
    leaves += [randn((outs,), dtype, device)] * ("bias" in sizes)
    upstream = [randn((rows, outs), dtype, device)]
    work = twice("linear", sizes, dtype)

    def exact() -> list[Tensor]:
        """y and dx of the rows at both ends, and the first rows of dW: the whole would take as long as all calls."""
        x, weight, *bias = (leaf.to(wider(dtype)) for leaf in leaves)
        dy = upstream[0].to(wider(dtype))
        some = [F.linear(ends(x), weight, *bias), ends(dy) @ weight, dy[:, :ENDS].T @ x]
        return [*some, dy.sum(0)] if bias else some

    def view(results: list[Tensor]) -> list[Tensor]:
        return [*(ends(t) for t in results[:2]), *(t[:ENDS] for t in results[2:3]), *results[3:]]

    return Case(
        "linear", sizes, dtype, device, "product", work, lambda f: f, lambda wrap: wrap(F.linear), leaves, upstream,
        exact=exact, view=view,
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
