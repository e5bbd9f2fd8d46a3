"""CUDA attention on a GPU, over many tiles of its kernels: the rule, and the same bits again. Without one these kernels
are emulated, on fewer tiles: test_cuda_attention.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attended import obeys, qkv
from rule import same
from torch import Tensor

from megapre import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

# Queries, keys, causal, window, ends of documents over two rows of the batch; around tiles of 64, 128 and 192.
CASES = {
    "causal": (1024, 1024, True, None, None),
    "ragged": (1000, 1000, True, None, None),
    "whole": (577, 961, False, None, None),
    "cached": (130, 1500, True, None, None),
    "window": (900, 900, True, 200, None),
    "documents": (1030, 1030, True, None, [3, 3, 400, 640, 1030, 1800]),
}


def attend(
    op: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, *settings: object
) -> list[Tensor]:
    """o, lse, dq, dk, dv."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    o, lse = op(*leaves, *settings, return_lse=True)
    return [o.detach(), lse.detach(), *torch.autograd.grad([o, lse], leaves, [do, dlse])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("case", CASES)
def test_obeys_the_rule_over_many_tiles(case: str, dim: int, dtype: torch.dtype) -> None:
    queries, keys, causal, window, ends = CASES[case]
    op = kernels.choose("cuda", {"attention": "cuda"}).attention
    tensors = [t.cuda() for t in qkv(2, queries, keys, 4, 2, dim, dtype)]
    cu_seqlens = None if ends is None else torch.tensor([0, *ends, 2 * keys], dtype=torch.int32, device="cuda")

    def twice(*arguments: Any) -> list[Tensor]:
        first, again = (attend(op, *arguments) for _ in range(2))
        assert same(first, again)
        return first

    obeys(twice, *tensors, causal, cu_seqlens, window)
