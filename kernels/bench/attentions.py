"""attention, with documents, windows and grouped heads."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import visible
from .case import Case, Function, Sizes, compiled, randn, take, twice
from .exact import wider

CHUNK = 1024  # queries whose exact scores are held at once


def attention(sizes: Sizes, dtype: str, device: str) -> Case:
    """Causal. `documents` cuts each row into that many of unequal length; FLOPs are counted inside them."""
    sizes = take({**sizes, "K": sizes.get("K", sizes["N"])}, "B", "S", "N", "K", "D", documents=0, window=0)
    batch, length, heads, k_heads = (sizes[name] for name in "BSNK")
    shape = (batch, length)
    leaves = [randn((*shape, n, sizes["D"]), dtype, device) for n in (heads, k_heads, k_heads)]
    window, documents = sizes.get("window"), sizes.get("documents", 0)
    ends = [0, length]
    if documents:
        generator = torch.Generator().manual_seed(0)
        ends = sorted({0, length, *(torch.randperm(length - 1, generator=generator)[: documents - 1] + 1).tolist()})
    cu_seqlens = None
    if documents:
        every = sorted({row * length + end for row in range(batch) for end in ends})
        cu_seqlens = torch.tensor(every, dtype=torch.int32, device=device)
    work: dict[str, tuple[int, int]] = {}
    for start, stop in itertools.pairwise(ends):
        for mode, (flops, moved) in twice("attention", {**sizes, "S": stop - start}, dtype).items():
            known = work.get(mode, (0, 0))
            work[mode] = (known[0] + flops, known[1] + moved)
    mask = visible(leaves[0], leaves[1], True, cu_seqlens, window) if documents or window else None

    def adapt(function: Function) -> Function:
        return lambda q, k, v: function(q, k, v, cu_seqlens=cu_seqlens, window=window)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        gqa = heads != k_heads
        if mask is not None and gqa and device != "cpu":  # the backends that take a mask take no grouped heads there
            k, v, gqa = k.repeat_interleave(heads // k_heads, 1), v.repeat_interleave(heads // k_heads, 1), False
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        return o.transpose(1, 2)

    peers: dict[str, Function] = {}
    if device != "cpu":
        peers = _flex(cu_seqlens, sizes, device) if documents else {} if window else _backends(own)
    upstream = [torch.randn_like(leaves[0])]
    group = heads // k_heads

    def view(results: list[Tensor]) -> list[Tensor]:
        """Of the last sequence the last key head, with its queries: exact scores of all heads would be too large."""
        return [result[-1, :, -group if result.shape[2] == heads else -1 :].transpose(0, 1) for result in results]

    def exact() -> list[Tensor]:
        q, k, v, do = (t.to(wider(dtype)) for t in view([*leaves, *upstream]))
        return _exact(q, k[0], v[0], do, None if mask is None else mask[-1, 0])

    return Case(
        "attention", sizes, dtype, device, "product", work, adapt, lambda wrap: wrap(own), leaves, upstream, peers,
        exact=exact, view=view, compiles=False,
    )  # fmt: skip


def _exact(q_GSD: Tensor, k_SD: Tensor, v_SD: Tensor, do_GSD: Tensor, mask: Tensor | None) -> list[Tensor]:
    """o, dq, dk, dv of causal attention of G query heads to one key head, some queries at a time."""
    length, scale = k_SD.shape[0], k_SD.shape[1] ** -0.5
    o, dq = torch.empty_like(q_GSD), torch.empty_like(q_GSD)
    dk, dv = torch.zeros_like(k_SD), torch.zeros_like(v_SD)
    token = torch.arange(length, device=k_SD.device)
    for at in token.split(CHUNK):
        seen = at[:, None] >= token if mask is None else mask[at]
        q, do = q_GSD[:, at], do_GSD[:, at]
        p = (q @ k_SD.T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        o[:, at] = p @ v_SD
        dv += (p.transpose(1, 2) @ do).sum(0)
        dp = do @ v_SD.T
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[:, at] = ds @ k_SD
        dk += (ds.transpose(1, 2) @ q).sum(0)
    return [o, dq, dk[None], dv[None]]


def _backends(function: Function) -> dict[str, Function]:
    """SDPA through each of its CUDA backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend: Any) -> Function:
        def call(*leaves: Tensor) -> Any:
            with sdpa_kernel(backend):
                return function(*leaves)

        return call

    names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return {name: through(getattr(SDPBackend, backend)) for name, backend in names.items()}


def _flex(cu_seqlens: Tensor | None, sizes: Sizes, device: str) -> dict[str, Function]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert cu_seqlens is not None, "flex_attention is the peer of documents"
    batch, length = sizes["B"], sizes["S"]
    token = torch.arange(batch * length, device=device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True).view(batch, length)
    block_mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j]), batch, None, length, length, device=device
    )
    attend = compiled(flex_attention)

    def call(*leaves: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in leaves)
        return attend(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)  # type: ignore[no-any-return]

    return {"flex": call}
