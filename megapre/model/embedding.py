"""Table lookup whose gradient is summed in fp32.

torch's CPU kernel adds the gradients of a row's occurrences in the dtype of the table. In bf16 that sum stops at
256 times an addend, and a frequent token (a comma is every twentieth) gets a gradient that is wrong in its first digit.
torch's CUDA kernel sums in fp32 already, and is used there.

Legend: V rows of the table, T tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Embedding):
    """nn.Embedding with that gradient, and left uninitialised: `init.initialize` draws every parameter by name."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 of any shape, below V. Returns [..., H]."""
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16:
            return _Lookup.apply(ids, self.weight)  # type: ignore[no-any-return]
        return F.embedding(ids, self.weight)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight_VH.shape[0]
        return F.embedding(ids, weight_VH)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, sum_rows(grad.flatten(0, -2), ids.flatten(), ctx.rows)


def sum_rows(grad_TH: Tensor, ids_T: Tensor, rows: int) -> Tensor:
    """[rows, H] in grad's dtype: row v is the fp32 sum, in order of t, of grad[t] where ids[t] = v, rounded once.

    Sums are made in [T, H] and not in [V, H], of which few rows occur. All shapes are static, so it can be traced.
    """
    sorted_T, order_T = ids_T.sort(stable=True)
    run_T = F.pad((sorted_T[1:] != sorted_T[:-1]).cumsum(0), (1, 0))  # which run of equal ids each belongs to
    sums_TH = torch.zeros(grad_TH.shape, dtype=torch.float32, device=grad_TH.device)
    sums_TH.index_add_(0, run_T, grad_TH[order_T].float())
    out_VH = grad_TH.new_zeros(rows, grad_TH.shape[1])
    # Several t may write the same row; they all write the same sum.
    return out_VH.index_copy_(0, sorted_T, sums_TH[run_T].to(grad_TH.dtype))
