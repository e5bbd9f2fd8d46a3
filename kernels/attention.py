"""Scaled dot-product attention: causal, grouped queries, documents, sliding window, log-sum-exp.

    s_ij = scale * q_i . k_j  over the keys j that query i may see;   o_i = sum_j softmax_j(s_ij) v_j
    lse_i = log sum_j exp(s_ij)

Query i of Sq stands at position i + Sk - Sq among the keys (a KV cache has more keys than queries). It may see key j if
    causal      j <= i + Sk - Sq
    window w    |i + Sk - Sq - j| < w: itself and the w - 1 before it (without causal also the w - 1 after it)
    cu_seqlens  i and j belong to one document. cu_seqlens [documents + 1] int32 counts over the flattened B*S tokens,
                from 0 to B*S; the end of a row of the batch is a boundary too. Needs Sq = Sk.

Shapes   q, o [B, Sq, N, D]; k, v [B, Sk, K, D]; lse [B, N, Sq] fp32. Head n of q uses head n // (N / K) of k and v
         (Ainslie et al. 2023).
Forward  4 D FLOPs per (query, visible key, head). Backward 10 D: five products, one of which is the forward's again.
Bytes    q, k, v, o once forward; these and do, dq, dk, dv backward. Scores never leave the chip in a fused kernel.
Floor    products: FLOPs / product rate, for all but the shortest sequences.
Memory   on the CPU the backward sums dk and dv of a key head in fp32, 8 Sk D bytes, once for each thread; less than
         twice that where B K is no multiple of the threads.

Where q, k and v are views of one projection (heads.py) the native backward writes dq, dk and dv as views of one tensor,
the projection's gradient, which a split's own backward would copy together.

SDPA is torch's registered op: fake tensors, autograd and torch.compile come with it, and on CUDA it picks cuDNN,
FlashAttention or the memory-efficient kernel by itself. Documents on the CPU are cut apart and attended one by one:
exact, and the work is the sum of the squared document lengths, not the square of the sum.

Measured bf16 B 2, S 1024, N = K = 12, D 64, causal, forward and backward in ms: native 11.5 and 25, SDPA 34 and 62.
         Four documents a row: native 7.6 and 16, cut apart for SDPA 25 and 60, SDPA with a dense mask 46 and 86. A
         window of 256: native 6.8 and 15, SDPA with a dense mask 46 and 88.
         AMD EPYC (Zen 4, AVX-512 bf16), two threads, torch 2.13, minimum of 25, 2026-11-21.
         CUDA C++, and Triton in its present form: not yet run on a GPU.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import documents, library
from .heads import are_joined, split
from .precision import wide

TAKES_CUDA = "fp16 and bf16, head dims of a multiple of 8 up to 256, scale > 0"


def reference(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch with whole fp32 scores, the definition of correct. Returns o, or (o, lse), o in the dtype of q.

    scale None means 1 / sqrt(D). ValueError when shapes disagree, N is no multiple of K, Sq > Sk, window < 1, or
    cu_seqlens is given with Sq != Sk or (looked at on the CPU only) does not rise from 0 to B*S.
    """
    check(q_BSND, k_BSKD, v_BSKD, cu_seqlens, window)
    with torch.autocast(q_BSND.device.type, enabled=False):
        dtype = wide(q_BSND.dtype)
        group = q_BSND.shape[2] // k_BSKD.shape[2]
        q = q_BSND.to(dtype).transpose(1, 2)
        k = k_BSKD.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1)
        v = v_BSKD.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1)
        scores = q @ k.transpose(-1, -2) * (_scale(q_BSND) if scale is None else scale)
        mask = visible(q_BSND, k_BSKD, causal, cu_seqlens, window)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        o = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).to(q_BSND.dtype)
    return (o, torch.logsumexp(scores, dim=-1)) if return_lse else o


def sdpa(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Through F.scaled_dot_product_attention. As `reference`, which serves return_lse, for SDPA gives none."""
    if return_lse:
        return reference(q_BSND, k_BSKD, v_BSKD, causal, cu_seqlens, window, scale, return_lse)
    check(q_BSND, k_BSKD, v_BSKD, cu_seqlens, window)
    if cu_seqlens is not None and q_BSND.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = _segments(cu_seqlens.tolist(), q_BSND.shape[1])
        if len(lengths) > q_BSND.shape[0]:
            return _by_document(q_BSND, k_BSKD, v_BSKD, lengths, causal, window, scale)
        cu_seqlens = None
    square = q_BSND.shape[1] == k_BSKD.shape[1]
    plain = cu_seqlens is None and (window is None or window >= k_BSKD.shape[1])
    # torch aligns its causal mask top-left, so only square scores may use it; one query sees every key of the cache.
    if plain and (not causal or square or q_BSND.shape[1] == 1):
        return _sdpa(q_BSND, k_BSKD, v_BSKD, causal and square, None, scale)
    return _sdpa(q_BSND, k_BSKD, v_BSKD, False, visible(q_BSND, k_BSKD, causal, cu_seqlens, window), scale)


def native(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Through `megapre::attention`, for fp32, bf16 and fp16 and head dims up to 256. As `reference`.

    lse can be differentiated. Keeps q, k, v, o and lse; tiles of scores that a mask hides whole cost nothing.
    A handful of fp32 queries on a cache goes through `sdpa`, for packing the keys would cost more than attending.
    ValueError for fp64, mixed dtypes and larger heads.
    """
    check(q_BSND, k_BSKD, v_BSKD, cu_seqlens, window)
    few = q_BSND.shape[1] < min(8, k_BSKD.shape[1]) and q_BSND.shape[3] <= 256
    if few and q_BSND.dtype == torch.float32 and cu_seqlens is None and not return_lse:
        return sdpa(q_BSND, k_BSKD, v_BSKD, causal, None, window, scale)
    settings = (causal, cu_seqlens, window, _scale(q_BSND) if scale is None else scale)
    o, lse = torch.ops.megapre.attention(q_BSND, k_BSKD, v_BSKD, *settings)
    return (o, lse) if return_lse else o


def cuda(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Through `megapre::attention` in CUDA C++. As `reference`; ValueError for what TAKES_CUDA leaves out."""
    check(q_BSND, k_BSKD, v_BSKD, cu_seqlens, window)
    settings = (causal, cu_seqlens, window, _scale(q_BSND) if scale is None else scale)
    o, lse = torch.ops.megapre.attention(q_BSND, k_BSKD, v_BSKD, *settings)
    return (o, lse) if return_lse else o


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    o_BNSD = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o_BNSD.transpose(1, 2)


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, window: int | None, scale: float | None
) -> Tensor:
    # split, not slices: its backward is one concatenation, where every slice would fill a gradient of full size.
    pieces = (torch.split(t.flatten(0, 1), lengths) for t in (q, k, v))
    parts = []
    for piece in zip(*pieces, strict=True):
        q_1SND, k_1SKD, v_1SKD = (t.unsqueeze(0) for t in piece)
        o = sdpa(q_1SND, k_1SKD, v_1SKD, causal, None, window, scale)
        parts.append(o.squeeze(0) if isinstance(o, Tensor) else o[0])
    return torch.cat(parts).view(q.shape)


def _segments(ends: list[int], seq_length: int) -> list[int]:
    """Lengths of the pieces of documents, cut at the ends of rows too."""
    cuts = sorted({*ends, *range(0, ends[-1], max(seq_length, 1))})
    return [b - a for a, b in pairwise(cuts)]


def visible(
    q_BSND: Tensor, k_BSKD: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int | None
) -> Tensor | None:
    """Which key each query may see, bool [1 or B, 1, Sq, Sk]; None when every query sees every key."""
    batch, queries, keys = q_BSND.shape[0], q_BSND.shape[1], k_BSKD.shape[1]
    device = q_BSND.device
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    terms = []
    if causal:
        terms.append(distance >= 0)
    if window is not None:
        terms.append(distance < window if causal else distance.abs() < window)
    if cu_seqlens is not None:
        document = documents.numbers(cu_seqlens.to(device), batch, queries)
        terms.append((document[:, :, None] == document[:, None, :])[:, None])
    if not terms:
        return None
    mask = terms[0]
    for term in terms[1:]:
        mask = mask & term
    return mask.expand(mask.shape[0] if mask.dim() == 4 else 1, 1, queries, keys)


def _scale(q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1])


def check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4:
        raise ValueError(f"attention: need q [B, Sq, N, D] and k, v [B, Sk, K, D]; they are {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: batch and head dim must agree; they are {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} queries but only {k.shape[1]} keys; Sq <= Sk is needed")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; a query sees at least itself, so window >= 1")
    if cu_seqlens is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"attention: documents (cu_seqlens) need Sq = Sk; they are {q.shape[1]} and {k.shape[1]}")
    documents.check("attention", cu_seqlens, q.shape[0] * q.shape[1])


# The registered ops: kernels in plain torch, fake tensors, autograd.


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    o, lse = reference(q, k, v, causal, cu_seqlens, window, scale, return_lse=True)
    return o.contiguous(), lse.contiguous()


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide(q.dtype))


def _backward_(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> None:
    """Dao 2023, algorithm 2; lse adds p * dlse to the gradient of the scores."""
    group = q.shape[2] // k.shape[2]
    # Grouped heads: [B, K, group, S, D] against [B, K, 1, S, D].
    q_, do_, o_ = (t.to(lse.dtype).transpose(1, 2).unflatten(1, (-1, group)) for t in (q, do, o))
    k_, v_ = (t.to(lse.dtype).transpose(1, 2).unsqueeze(2) for t in (k, v))
    scores = q_ @ k_.transpose(-1, -2) * scale
    mask = visible(q, k, causal, cu_seqlens, window)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), -math.inf)
    p = torch.exp(scores - lse.unflatten(1, (-1, group)).unsqueeze(-1))
    delta = (do_ * o_).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.unflatten(1, (-1, group)).unsqueeze(-1)
    ds = p * (do_ @ v_.transpose(-1, -2) - delta) * scale
    dq.copy_((ds @ k_).flatten(1, 2).transpose(1, 2))
    dk.copy_((ds.transpose(-1, -2) @ q_).sum(2).transpose(1, 2))
    dv.copy_((p.transpose(-1, -2) @ do_).sum(2).transpose(1, 2))


def _backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _backward_fake(do, dlse, q, k, v)
    torch.ops.megapre.attention_backward_(*gradients, do, dlse, q, k, v, *rest)
    return gradients


def _backward_fake(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, cu_seqlens, ctx.window, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    given = (do, dlse, q, k, v, o, lse, ctx.causal, cu_seqlens, ctx.window, ctx.scale)
    if are_joined(q, k, v) and not torch.is_grad_enabled():  # then heads.split takes them for one gradient
        gradients = split(q.new_empty(*q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3]), q.shape[2], k.shape[2])
        torch.ops.megapre.attention_backward_(*gradients, *given)
    else:
        gradients = torch.ops.megapre.attention_backward(*given)
    return *gradients, None, None, None, None


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::attention`, its backward, and the form of that which writes into given memory."""
    settings = "bool causal, Tensor? cu_seqlens, int? window, float scale"
    kept = "Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse"
    library.add(
        ops, f"attention(Tensor q, Tensor k, Tensor v, {settings}) -> (Tensor o, Tensor lse)", _forward, _forward_fake
    )
    library.add(
        ops,
        f"attention_backward_(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, {kept}, {settings}) -> ()",
        _backward_,
        lambda *_: None,
    )
    library.add(
        ops,
        f"attention_backward({kept}, {settings}) -> (Tensor dq, Tensor dk, Tensor dv)",
        _backward,
        _backward_fake,
    )
    torch.library.register_autograd("megapre::attention", _differentiate, setup_context=_save, lib=ops)
