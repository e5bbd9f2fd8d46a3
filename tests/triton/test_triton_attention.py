"""Attention: causal, grouped heads, head dims, documents, windows, a cache of keys, strides, lse and its gradient."""

import pytest
import torch
from rule import run, same, twice
from torch import Tensor

from megapre.kernels import attention as plain
from megapre.kernels.triton import attention, attention_backward, ops


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles in a short sequence, so that all three phases of the loop run and tiles are skipped."""
    monkeypatch.setattr(attention, "policy", lambda head_dim, size, dense: (32, 16, 4, 2))
    monkeypatch.setattr(attention_backward, "key_policy", lambda head_dim, size, dense: (16, 32, 4, 2))
    monkeypatch.setattr(attention_backward, "query_policy", lambda head_dim, size, dense: (32, 16, 4, 2))


def inputs(
    batch: int, queries: int, keys: int, heads: int, k_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + head_dim)
    shapes = [(batch, queries, heads, head_dim), (batch, keys, k_heads, head_dim), (batch, keys, k_heads, head_dim)]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def compare(tensors: list[Tensor], **arguments: object) -> None:
    twice(
        lambda q, k, v: ops.attention(q, k, v, return_lse=True, **arguments),  # type: ignore[arg-type]
        lambda q, k, v: plain.reference(q, k, v, return_lse=True, **arguments),  # type: ignore[arg-type]
        tensors,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 16, 33, 97])
def test_lengths(device: str, causal: bool, length: int) -> None:
    compare(inputs(2, length, length, 2, 1, 16, torch.float32, device), causal=causal)


@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 96, 128, 256])
def test_head_dims_and_groups(device: str, head_dim: int) -> None:
    compare(inputs(1, 50, 50, 6, 2, head_dim, torch.float32, device), scale=0.3)


def in_its_dtype(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What torch's composition gives when scores and probabilities are rounded too, as tensor cores need them."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / 8.0).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(device: str, dtype: torch.dtype) -> None:
    twice(lambda *t: ops.attention(*t), in_its_dtype, inputs(1, 70, 70, 4, 2, 64, dtype, device))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 7, 16, 40, 1000])
def test_windows(device: str, causal: bool, window: int) -> None:
    compare(inputs(1, 97, 97, 1, 1, 16, torch.float32, device), causal=causal, window=window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "ends", [[194], [1, 2, 3, 100, 194], [97, 194], [16, 16, 32, 150, 150, 193, 194], [90, 110, 194]]
)
@pytest.mark.parametrize("window", [None, 20])
def test_documents(device: str, causal: bool, ends: list[int], window: int | None) -> None:
    """Two rows of 97: documents of one token, of none, across the end of a row, on the edge of a tile."""
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    tensors = inputs(2, 97, 97, 1, 1, 16, torch.float32, device)
    compare(tensors, causal=causal, cu_seqlens=cu_seqlens, window=window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries, keys, window", [(1, 40, None), (20, 75, None), (20, 75, 9), (33, 34, 1000)])
def test_a_cache_of_keys(device: str, causal: bool, queries: int, keys: int, window: int | None) -> None:
    compare(inputs(2, queries, keys, 2, 1, 16, torch.float32, device), causal=causal, window=window)


def test_documents_are_found_by_bisection(device: str) -> None:
    for ends in ([12], [1, 12], [3, 3, 3, 9, 12], list(range(1, 13))):
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        firsts, lasts = attention.document_bounds(cu_seqlens, 2, 6).tolist()
        for token in range(12):
            row = token // 6 * 6
            end = min(e for e in ends if e > token)
            start = max(s for s in [0, *ends] if s <= token)
            assert firsts[token // 6][token % 6] == max(start - row, 0)
            assert lasts[token // 6][token % 6] == min(end - row, 6)


def test_tiles_outside_the_documents_are_not_read(device: str) -> None:
    """NaN in another document, a tile away, must not be seen; read and multiplied by 0 it would be."""
    q, k, v = inputs(1, 96, 96, 1, 1, 16, torch.float32, device)
    cu_seqlens = torch.tensor([0, 32, 96], dtype=torch.int32, device=device)
    k[:, 32:] = float("nan")
    v[:, 32:] = float("nan")
    assert not bool(ops.attention(q, k, v, cu_seqlens=cu_seqlens)[:, :32].isnan().any())  # type: ignore[call-overload]


def test_views_of_one_projection_gradients_of_one_output_and_repeats(device: str) -> None:
    qkv = torch.randn(2, 40, 4, 16, generator=torch.Generator().manual_seed(0)).to(device)
    views = [qkv[:, :, :2], qkv[:, :, 2:3], qkv[:, :, 3:]]
    first = run(lambda *t: ops.attention(*t), views)
    packed = run(lambda *t: ops.attention(*t), [t.contiguous() for t in views])
    assert same(first[0] + first[1], packed[0] + packed[1])
    twice(lambda *t: ops.attention(*t, return_lse=True)[1] + 0 * t[2].sum(),
          lambda *t: plain.reference(*t, return_lse=True)[1] + 0 * t[2].sum(), views)  # fmt: skip


def test_what_it_cannot_do_is_refused(device: str) -> None:
    q = torch.randn(1, 2, 1, 16, device=device)
    with pytest.raises(ValueError, match="scale > 0"):
        ops.attention(q, q, q, scale=-1.0)
    assert ops.attention(q[:0], q[:0], q[:0]).shape == (0, 2, 1, 16)  # type: ignore[union-attr]
