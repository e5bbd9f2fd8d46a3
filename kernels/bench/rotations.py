"""rope and rope_."""

import torch
from torch import Tensor

from ..cost import cost
from .case import Case, Function, Sizes, Wrap, randn, refill, take, twice
from .exact import through_autograd, wider


def _rope_inputs(sizes: Sizes, dtype: str, device: str) -> tuple[dict[str, int], list[Tensor], tuple[Tensor, Tensor]]:
    length = sizes.get("S", sizes["T"])
    sizes = take({**sizes, "K": sizes.get("K", sizes["N"])}, "T", "N", "K", "D")
    batch = max(sizes["T"] // length, 1)
    length = sizes["T"] // batch
    sizes["T"] = batch * length
    q_and_k = [randn((batch, length, sizes[heads], sizes["D"]), dtype, device) for heads in "NK"]
    frequencies = 10000.0 ** -(torch.arange(sizes["D"] // 2, device=device) / (sizes["D"] // 2))
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return sizes, q_and_k, (angles.cos(), angles.sin())


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The way that model code commonly writes it, with tables of the head's whole width in the dtype of x."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def _exact(q_and_k: list[Tensor], tables: tuple[Tensor, Tensor], upstream: list[Tensor], dtype: str) -> list[Tensor]:
    """Both turned, and the gradients, by tables in the wider dtype."""
    wide = [torch.cat((table, table), -1)[None, :, None].to(wider(dtype)) for table in tables]

    def turned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _rotate_half(q, *wide), _rotate_half(k, *wide)

    return through_autograd(turned, q_and_k, upstream, wider(dtype))


def rope(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes, leaves, (cos, sin) = _rope_inputs(sizes, dtype, device)
    wide = [torch.cat((table, table), -1)[None, :, None].to(leaves[0].dtype) for table in (cos, sin)]

    def adapt(function: Function) -> Function:
        return lambda q, k: function(q, k, cos, sin)

    def own(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _rotate_half(q, *wide), _rotate_half(k, *wide)

    upstream = [torch.randn_like(leaf) for leaf in leaves]
    work = twice("rope", sizes, dtype)
    return Case(
        "rope", sizes, dtype, device, "copy", work, adapt, lambda wrap: wrap(own), leaves, upstream,
        exact=lambda: _exact(leaves, (cos, sin), upstream, dtype),
    )  # fmt: skip


def rope_(sizes: Sizes, dtype: str, device: str) -> Case:
    """Queries and keys turned where they lie in the joined heads [B, S, N + 2K, D] of one projection."""
    sizes, (q, k), (cos, sin) = _rope_inputs(sizes, dtype, device)
    heads, k_heads = sizes["N"], sizes["K"]
    fresh = torch.cat((q, k, torch.randn_like(k)), 2)
    qkv = fresh.clone()
    wide = [torch.cat((table, table), -1)[None, :, None].to(q.dtype) for table in (cos, sin)]

    def adapt(function: Function) -> Function:
        return lambda: list(function(qkv, heads, k_heads, cos, sin))

    def plain(wrap: Wrap) -> Function:
        rotate = wrap(lambda q, k: [_rotate_half(q, *wide), _rotate_half(k, *wide)])

        def step() -> list[Tensor]:
            q, k, v = qkv.split((heads, k_heads, k_heads), dim=2)
            return [*rotate(q, k), v]

        return step

    work = {"step": cost("rope", sizes, dtype)}
    return Case(
        "rope_", sizes, dtype, device, "copy", work, adapt, plain, prepare=refill([qkv], [fresh]),
        exact=lambda: _exact([q, k], (cos, sin), [q, k], dtype)[:2],
    )  # fmt: skip
