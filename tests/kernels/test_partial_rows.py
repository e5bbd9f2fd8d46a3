"""Rows that take part of an op's calls, on a GPU: right in what they take, an error with a way out for the rest."""

import pytest
import torch
from rule import same, twice
from torch import Tensor

from megapre import kernels
from megapre.kernels import attention, rope

pytestmark = pytest.mark.gpu
ROWS = [row for row in kernels.table("cuda") if row.takes and row.available] if torch.cuda.is_available() else []
ATTENTION = [row.implementation for row in ROWS if row.op == "attention"]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to("cuda", dtype)


@pytest.mark.parametrize("implementation", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (6, 2, 32)])
@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention(
    implementation: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, causal: bool
) -> None:
    op = kernels.choose("cuda", {"attention": implementation}).attention
    q, k, v = (random(2, 200, count, head_dim, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    twice(lambda q, k, v: op(q, k, v, causal), lambda q, k, v: attention.sdpa(q, k, v, causal), [q, k, v])
    assert same([op(q, k, v, causal)], [op(q, k, v, causal)])


@pytest.mark.parametrize(
    "implementation", [name for name in ATTENTION if name == "cuda" or name.startswith("flash_attention")]
)
@pytest.mark.parametrize("window", [None, 50])
def test_packed_attention(implementation: str, window: int | None) -> None:
    op = kernels.choose("cuda", {"attention": implementation}).attention
    cu_seqlens = torch.tensor([0, 30, 170, 290, 400], dtype=torch.int32, device="cuda")
    tensors = [random(2, 200, heads, 64) for heads in (4, 2, 2)]
    twice(
        lambda q, k, v: op(q, k, v, True, cu_seqlens, window),
        lambda q, k, v: attention.sdpa(q, k, v, True, cu_seqlens, window),
        tensors,
    )


@pytest.mark.parametrize("implementation", ATTENTION)
def test_the_rest_is_refused(implementation: str) -> None:
    op = kernels.choose("cuda", {"attention": implementation}).attention
    q = random(1, 6, 2, 64)
    with pytest.raises(ValueError, match="; choose `"):
        op(q.float(), q.float(), q.float())
    if implementation != "cuda":
        with pytest.raises(ValueError, match="; choose `"):
            op(q, q, q, return_lse=True)


@pytest.mark.parametrize("implementation", [row.implementation for row in ROWS if row.op == "rope"])
def test_rope(implementation: str) -> None:
    op = kernels.choose("cuda", {"rope": implementation}).rope
    angles = torch.outer(torch.arange(40.0), 0.5 ** torch.arange(32.0)).cuda()
    twice(
        lambda q, k: op(q, k, angles.cos(), angles.sin()),
        lambda q, k: rope.reference(q, k, angles.cos(), angles.sin()),
        [random(2, 33, 6, 64), random(2, 33, 2, 64)],
    )
