"""Which layer of the model is cut how among tensor-parallel ranks, and which elements of a weight each rank holds.

The names are those of the layers within a block, and of the tables around the blocks; gpt2 and llama differ in which of
them exist. What is not named (norms, the biases of row layers, learned positions) is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from megapre.config import Model

CUT = {
    "attn.qkv": "column",
    "attn.out": "row",
    "mlp.up": "column",
    "mlp.gate_up": "column",
    "mlp.down": "row",
    "embed": "vocab",
    "head": "vocab",
}
OWN_HEADS = ("attn.q_norm.weight", "attn.k_norm.weight")
"""Whole on every rank, but each rank sees its own heads alone."""


class Held(NamedTuple):
    """What a rank holds of a weight: these ranges along `dim` of the whole, of shape `shape`, one after the other.

    The whole has the true vocabulary; a range may go beyond it, into padding.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]

    def in_whole(self, values: Tensor, begin: int = 0) -> Iterator[tuple[int, Tensor]]:
        """`values`, which the rank has from place `begin` along `dim` on, as views that lie together in the whole, each
        with its place there; padding in none.
        """
        at = 0
        for first, last in self.ranges:
            length = min(last, self.shape[self.dim]) - first
            start, stop = max(begin, at), min(begin + values.shape[self.dim], at + length)
            if start < stop:
                yield first + start - at, values.narrow(self.dim, start - begin, stop - start)
            at += last - first

    def pieces(self, whole: Tensor, part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the whole weight and of the rank's part, pair by pair of the same elements; padding in none."""
        for place, view in self.in_whole(part):
            yield whole.narrow(self.dim, place, view.shape[self.dim]), view


def short(name: str) -> str:
    """A parameter's name without its block: attn.qkv.weight of blocks.3.attn.qkv.weight."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def local(cfg: Model, size: int) -> Model:
    """The widths of one of `size` ranks. With fewer key-value heads than ranks several ranks hold the same one."""
    if size == 1:
        return cfg
    widths = {"heads": cfg.heads // size, "kv_heads": max(cfg.kv_heads // size, 1), "ffn": cfg.ffn // size}
    return cfg.model_copy(update=widths)


def held(name: str, part: Sequence[int], cfg: Model, rank: int = 0, size: int = 1) -> Held:
    """What rank `rank` of `size` holds of parameter `name` of the model `cfg`, in its tensor of shape `part`."""
    layer = short(name).rpartition(".")[0]
    if not is_cut(name):
        return Held(0, ((0, part[0]),), tuple(part))

    def share(width: int, start: int = 0) -> tuple[int, int]:
        return start + rank * width // size, start + (rank + 1) * width // size

    q, dim, length = cfg.heads * cfg.head_dim, 0, cfg.ffn
    if CUT[layer] == "vocab":
        ranges, length = [share(cfg.vocab_padded)], cfg.vocab
    elif layer == "attn.qkv":
        kv = cfg.kv_heads * cfg.head_dim
        first = rank * cfg.kv_heads // size * cfg.head_dim  # the same head for size / kv_heads neighbours
        last = first + max(cfg.kv_heads // size, 1) * cfg.head_dim
        ranges, length = [share(q), (q + first, q + last), (q + kv + first, q + kv + last)], q + 2 * kv
    elif layer == "attn.out":
        ranges, dim, length = [share(q)], 1, q
    elif layer == "mlp.gate_up":
        ranges, length = [share(cfg.ffn), share(cfg.ffn, cfg.ffn)], 2 * cfg.ffn
    else:
        ranges, dim = [share(cfg.ffn)], 1 if CUT[layer] == "row" else 0
    return Held(dim, tuple(ranges), (*part[:dim], length, *part[dim + 1 :]))


def is_cut(name: str) -> bool:
    """Whether tensor-parallel ranks hold different elements of parameter `name`."""
    layer, _, kind = short(name).rpartition(".")
    return layer in CUT and not (CUT[layer] == "row" and kind == "bias")


def needs_sum(name: str, sequence: bool) -> bool:
    """Whether a tensor-parallel rank has only its share of the gradient of a weight that all hold whole: that of its
    tokens, or of its heads."""
    return not is_cut(name) and (sequence or short(name) in OWN_HEADS)
