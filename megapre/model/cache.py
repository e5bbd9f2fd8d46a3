"""Keys and values of the past, so that a new token costs one column of attention and not the whole square.

Legend: L layers, B batch, S new positions, P past positions, K key-value heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megapre.config import Model


class LayerCache(NamedTuple):
    """One layer's share of a KVCache: the whole allocation, of which the first `length` positions are filled."""

    k_BCKD: Tensor
    v_BCKD: Tensor
    length: int

    def extend(self, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Write S new positions behind the P past ones; return views of all P + S."""
        end = self.length + k_BSKD.shape[1]
        self.k_BCKD[:, self.length : end] = k_BSKD
        self.v_BCKD[:, self.length : end] = v_BSKD
        return self.k_BCKD[:, :end], self.v_BCKD[:, :end]


class KVCache:
    """Room for `capacity` positions of `batch` sequences in every layer, allocated once: 2 L B C K D elements.

    All sequences of the batch have the same length. `Transformer.hidden` extends every layer, then moves `length`.
    """

    def __init__(
        self, cfg: Model, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (cfg.layers, batch, capacity, cfg.kv_heads, cfg.head_dim)
        self.k_LBCKD = torch.empty(shape, dtype=dtype, device=device)
        self.v_LBCKD = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.k_LBCKD[index], self.v_LBCKD[index], self.length)
