"""Rotary position embedding of queries and keys.

    (a, b) -> (a cos - b sin, b cos + a sin)   for each pair of a head's dims, by the angle of its position
                                                                                  (Su et al. 2021, eq. 34)
Pairs: (i, i + D/2), the GPT-NeoX and Llama-in-Hugging-Face pairing; or (2i, 2i + 1) with interleaved=True, as in the
paper and Meta's Llama weights.

Positions of the tokens, row p of the tables belonging to position p: `positions` [B, S] int64; or, with `cu_seqlens`,
each token's place in its document (bounds [documents + 1] int32 over the flattened B*S tokens, the end of a row of the
batch being a boundary too, as for attention); with neither, 0 .. S-1 in every row.

Two forms. `rope` returns new q and k. `rope_` turns the joined heads of one projection, qkv [B, S, N + 2K, D], where
they lie and returns q, k, v as views of it: what attention keeps for its backward is then the projection's own output,
and its backward writes the gradient of qkv once, where a rotation, a split and their gradients would pass over it
three times.

Shapes   q [B, S, N, D]; k, v [B, S, K, D]; cos, sin [P, D/2] fp32.
Forward  6 FLOPs a pair; reads and writes q and k once: 2 passes over B*S*(N+K)*D elements; the tables are small.
Backward the same with -sin: a rotation's transpose is its inverse. Only cos and sin are kept for it. `rope_` also moves
         the gradient of v: 2 passes over B*S*(N+2K)*D elements.
Floor    memory: bytes / copy rate.
Measured bf16, q and k of 2048 x 16 x 128: native 0.88 ms, in place in a projection 1.07 ms, gradient of the projection
         1.4 ms; torch's rotate-half composition 4.1 ms, a copy of q and k 0.86 ms.
         AMD EPYC (Zen 4, AVX-512 bf16), two threads, torch 2.13, minimum of 25, 2026-11-21.
         CUDA C++, and Triton within a projection: not yet run on a GPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import documents, library
from .heads import QKV, split
from .precision import wide


class Turn(NamedTuple):
    """By which angles: what `rope` takes beside the heads."""

    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    cu_seqlens: Tensor | None
    interleaved: bool


def reference(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain torch, the definition of correct. Rotates in fp32; returns (q, k) in their own dtypes.

    ValueError when the head dim is odd or not twice the tables' width, when positions and cu_seqlens are both given,
    when the tables have fewer rows than S (neither given), and, looked at on the CPU only, when cu_seqlens does not
    rise from 0 to B*S or a position is outside the tables.
    """
    check(q_BSND, k_BSKD, cos, sin, positions, cu_seqlens)
    if cu_seqlens is not None:
        positions = documents.positions(cu_seqlens, *q_BSND.shape[:2])
    check_positions(positions, cos.shape[0])
    if positions is None:
        seq_length = q_BSND.shape[1]
        cos_rows, sin_rows = cos[None, :seq_length, None], sin[None, :seq_length, None]
    else:
        cos_rows, sin_rows = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
    return _rotate(q_BSND, cos_rows, sin_rows, interleaved), _rotate(k_BSKD, cos_rows, sin_rows, interleaved)


def _rotate(x_BSND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    x = x_BSND.to(wide(x_BSND.dtype))
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return rotated.to(x_BSND.dtype)


def native(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Through `megapre::rope`: one pass. As `reference`."""
    positions = None if positions is None else positions.expand(q_BSND.shape[:2])
    return torch.ops.megapre.rope(  # type: ignore[no-any-return]
        q_BSND, k_BSKD, cos, sin, positions, cu_seqlens, interleaved, False
    )


def reference_(
    qkv_BSMD: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
) -> QKV:
    """(q, k, v) of the joined heads qkv [B, S, N + 2K, D], q and k rotated; here they are new, and qkv stays as it is.

    Every other form turns q and k where they lie: q, k and v are views of qkv, which must not be read otherwise
    afterwards (torch notices where a backward would), nor be a leaf that requires a gradient. ValueError as
    `reference`, and when qkv does not have N + 2K heads.
    """
    q, k, v = split(qkv_BSMD, heads, kv_heads)
    q, k = reference(q, k, cos, sin, positions, interleaved, cu_seqlens)
    return q, k, v


def native_(
    qkv_BSMD: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
) -> QKV:
    """Through `megapre::rope_`: one pass each way, in place. As `reference_`; not in place inside torch.compile."""
    q, k, v = split(qkv_BSMD, heads, kv_heads)
    positions = None if positions is None else positions.expand(q.shape[:2])
    if torch.compiler.is_compiling():
        q, k = torch.ops.megapre.rope(q, k, cos, sin, positions, cu_seqlens, interleaved, False)
        return q, k, v
    return in_place(_NATIVE, qkv_BSMD, heads, kv_heads, Turn(cos, sin, positions, cu_seqlens, interleaved))


class InPlace(NamedTuple):
    """An implementation of `rope_` in two halves."""

    forward: Callable[[Tensor, int, int, Turn], None]  # rotates the first N + K heads of qkv
    backward: Callable[[Tensor, Tensor, Tensor, Turn], Tensor]  # dqkv of dq, dk, dv


def in_place(halves: InPlace, qkv: Tensor, heads: int, kv_heads: int, turn: Turn) -> QKV:
    """(q, k, v) in the memory of qkv, by `halves`. ValueError for a leaf that requires a gradient."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        if qkv.is_leaf:
            raise ValueError("rope_: qkv is a leaf that requires a gradient; it cannot be rotated in place")
        return _InPlace.apply(qkv, heads, kv_heads, turn, halves)  # type: ignore[no-any-return]
    halves.forward(qkv, heads, kv_heads, turn)
    return split(qkv, heads, kv_heads)


class _InPlace(torch.autograd.Function):
    """q, k and v as three outputs, so that their gradients come apart and are joined and rotated in one pass.

    Autograd's own way, to return qkv as modified in place, would split it afterwards: one more pass to join the
    gradients, and a copy of them because qkv is a view of the projection's output. The outputs are cut from an alias
    that autograd does not know; it shares the version counter, so a tensor saved before the rotation is still noticed.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, kv_heads: int, turn: Turn, halves: InPlace) -> QKV:
        ctx.save_for_backward(*turn[:4])
        ctx.interleaved, ctx.backward_half = turn.interleaved, halves.backward
        alias = qkv.detach()
        halves.forward(alias, heads, kv_heads, turn)
        return split(alias, heads, kv_heads)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin, positions, cu_seqlens = ctx.saved_tensors
        turn = Turn(cos, sin, positions, cu_seqlens, ctx.interleaved)
        return ctx.backward_half(dq, dk, dv, turn), None, None, None, None


def _native_forward(qkv: Tensor, heads: int, kv_heads: int, turn: Turn) -> None:
    torch.ops.megapre.rope_(qkv, heads + kv_heads, *turn)


def _native_backward(dq: Tensor, dk: Tensor, dv: Tensor, turn: Turn) -> Tensor:
    return torch.ops.megapre.rope_qkv_backward(dq, dk, dv, *turn)  # type: ignore[no-any-return]


_NATIVE = InPlace(_native_forward, _native_backward)


def check(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """ValueError as `reference`, but for the values of positions."""
    head_dim, seq_length = q_BSND.shape[-1], q_BSND.shape[1]
    if k_BSKD.shape[-1] != head_dim or k_BSKD.shape[:2] != q_BSND.shape[:2]:
        raise ValueError(f"rope: q is {tuple(q_BSND.shape)} and k is {tuple(k_BSKD.shape)}; they differ only in heads")
    if cos.shape != sin.shape or 2 * cos.shape[-1] != head_dim:
        raise ValueError(
            f"rope: cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be [positions, head_dim / 2] "
            f"with head_dim {head_dim}"
        )
    if positions is not None and cu_seqlens is not None:
        raise ValueError("rope: positions and cu_seqlens are both given; either says where the tokens stand")
    if positions is None and cu_seqlens is None and seq_length > cos.shape[0]:
        raise ValueError(f"rope: {seq_length} positions are asked for, the tables hold {cos.shape[0]}")
    documents.check("rope", cu_seqlens, q_BSND.shape[0] * seq_length)


def check_positions(positions: Tensor | None, rows: int) -> None:
    """ValueError naming the first position outside the tables, on the CPU; nothing elsewhere."""
    if positions is None or positions.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = (positions < 0) | (positions >= rows)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise ValueError(
            f"rope: position {int(positions[tuple(at)])} at {at} lies outside [0, {rows}), the rows of the tables"
        )


# The registered ops: kernels in plain torch, fake tensors, autograd.


def _forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = reference(q, k, cos, -sin if inverse else sin, positions, interleaved, cu_seqlens)
    return q_out.contiguous(), k_out.contiguous()


def _forward_in_place(
    qkv: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
) -> None:
    rotated = qkv[:, :, :heads]
    rotated.copy_(reference(rotated, rotated[:, :, :0], cos, sin, positions, interleaved, cu_seqlens)[0])


def _qkv_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
) -> Tensor:
    return torch.cat((*reference(dq, dk, cos, -sin, positions, interleaved, cu_seqlens), dv), dim=2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, cu_seqlens, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions, cu_seqlens)


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = torch.ops.megapre.rope(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dq, dk, None, None, None, None, None, None


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::rope`, the form in place and its backward."""
    where = "Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens, bool interleaved"
    library.add(
        ops,
        f"rope(Tensor q, Tensor k, {where}, bool inverse) -> (Tensor q_out, Tensor k_out)",
        _forward,
        lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    )
    library.add(ops, f"rope_(Tensor(a!) qkv, int heads, {where}) -> ()", _forward_in_place, lambda *_: None)
    library.add(
        ops,
        f"rope_qkv_backward(Tensor dq, Tensor dk, Tensor dv, {where}) -> Tensor dqkv",
        _qkv_backward,
        lambda dq, dk, dv, *_: dq.new_empty(*dq.shape[:2], dq.shape[2] + dk.shape[2] + dv.shape[2], dq.shape[3]),
    )
    torch.library.register_autograd("megapre::rope", _differentiate, setup_context=_save, lib=ops)
