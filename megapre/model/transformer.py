"""The transformer: GPT-2 and Llama-style families, written as if for one device.

    x = embedding                                        y = norm(x)
    for every block:  x += attention(norm1(x));  x += mlp(norm2(x))          loss = cross_entropy(y @ head.T)

The residual stream never meets an addition of its own: each norm takes the stream and the last sublayer's output and
returns both their sum and its norm (`ops.layer_norm`, `ops.rms_norm` with `residual=`), one pass over memory instead of
two. So a block hands on the pair (x, residual) whose sum is the stream.

Operations come from `ops`, the kernels chosen for the device. Embedding, blocks, and final norm with head are separate
methods: any run of them in this order is a piece of a model.

Legend: B batch, S sequence, T = B*S tokens, H hidden, N query heads, K key-value heads, D head dim, F ffn width,
V vocabulary, Vp the same padded to a multiple of 128. Row V and beyond of embed.weight and head.weight exist so that
products have round shapes; they are zero, no token reads them and no gradient reaches them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megapre.kernels.heads import split
from megapre.model.cut import CUT, local
from megapre.model.errors import ModelError
from megapre.model.recompute import Recompute, forgetting
from megapre.model.rope import Rotary
from megapre.parallel.tensor import ColumnLinear, RowLinear, VocabEmbedding, enter

if TYPE_CHECKING:
    from megapre.config import Model
    from megapre.kernels import Kernels
    from megapre.model.cache import KVCache, LayerCache
    from megapre.parallel.tensor import TensorGroup


Like = dict[str, Any]  # what every parameter is made like: its dtype and device
Again = Callable[[], Tensor] | None  # makes a layer's input again; None: the layer keeps it
NOTHING = Recompute()


class Places(NamedTuple):
    """Where the tokens of a batch of `shape` [B, S] stand. The same for every block.

    Column s is at position start + s, or at positions_BS where that is given. cos and sin (None without rope) are the
    table's rows from `start` on, or the whole table for positions_BS to choose from.
    """

    shape: torch.Size
    start: int
    positions_BS: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: Tensor | None


class Make(NamedTuple):
    """How layers are made: over which kernels, in which dtype and where, and cut over which ranks (None: not cut)."""

    ops: Kernels
    like: Like
    tensor: TensorGroup | None

    def linear(self, name: str, ins: int, outs: int, bias: bool) -> nn.Module:
        """The layer `name` of CUT, with the inputs and outputs of this rank."""
        kind = {"column": ColumnLinear, "row": RowLinear}[CUT[name]]
        return kind(ins, outs, bias, self.ops, self.like, self.tensor)


class LayerNorm(nn.Module):
    """LayerNorm of the stream, with the residual addition in the same pass."""

    def __init__(self, cfg: Model, make: Make) -> None:
        super().__init__()
        self.eps, self.ops = cfg.norm_eps, make.ops
        self.weight = nn.Parameter(torch.empty(cfg.hidden, **make.like))
        self.bias = nn.Parameter(torch.empty(cfg.hidden, **make.like)) if cfg.bias else None

    def forward(self, x_BSH: Tensor, residual_BSH: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(h), h) with h = x + residual, or x alone."""
        out = self.ops.layer_norm(x_BSH, self.weight, self.bias, eps=self.eps, residual=residual_BSH)
        return (out, x_BSH) if residual_BSH is None else out


class RMSNorm(nn.Module):
    """RMSNorm of the stream, as LayerNorm."""

    def __init__(self, cfg: Model, make: Make) -> None:
        super().__init__()
        self.eps, self.ops = cfg.norm_eps, make.ops
        self.weight = nn.Parameter(torch.empty(cfg.hidden, **make.like))

    def forward(self, x_BSH: Tensor, residual_BSH: Tensor | None) -> tuple[Tensor, Tensor]:
        out = self.ops.rms_norm(x_BSH, self.weight, eps=self.eps, residual=residual_BSH)
        return (out, x_BSH) if residual_BSH is None else out


class HeadNorm(nn.Module):
    """RMSNorm within each head of q or k (Henry et al. 2020, arXiv:2010.04245; Qwen3's form)."""

    def __init__(self, cfg: Model, make: Make) -> None:
        super().__init__()
        self.eps, self.ops = cfg.norm_eps, make.ops
        self.weight = nn.Parameter(torch.empty(cfg.head_dim, **make.like))

    def forward(self, x_BSND: Tensor) -> Tensor:
        return self.ops.rms_norm(x_BSND, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Causal attention with grouped queries: head n reads key-value head n // (N / K)."""

    def __init__(self, cfg: Model, make: Make) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.ops = cfg.heads, cfg.kv_heads, cfg.head_dim, make.ops
        self.qkv = make.linear("attn.qkv", cfg.hidden, (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim, cfg.bias)
        self.q_norm = HeadNorm(cfg, make) if cfg.qk_norm else None
        self.k_norm = HeadNorm(cfg, make) if cfg.qk_norm else None
        self.out = make.linear("attn.out", cfg.heads * cfg.head_dim, cfg.hidden, cfg.bias)

    def forward(self, x_BSH: Tensor, again: Again, places: Places, cache: LayerCache | None) -> Tensor:
        with forgetting(x_BSH, again):
            qkv = self.qkv(x_BSH).view(*places.shape, -1, self.head_dim)
        q_BSND, k_BSKD, v_BSKD = self.turned(qkv, places)
        if cache is not None:
            k_BSKD, v_BSKD = cache.extend(k_BSKD, v_BSKD)
        o_BSND = self.ops.attention(q_BSND, k_BSKD, v_BSKD, causal=True, cu_seqlens=places.cu_seqlens)
        return self.out(o_BSND.flatten(2) if x_BSH.dim() == 3 else o_BSND.flatten(2).flatten(0, 1))

    def turned(self, qkv: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, normed and rotated as the model asks; in the memory of qkv where no norm stands between."""
        cos, sin, positions_BS = places.cos, places.sin, places.positions_BS
        if cos is not None and self.q_norm is None:
            return self.ops.rope_(qkv, self.heads, self.kv_heads, cos, sin, positions=positions_BS)
        q_BSND, k_BSKD, v_BSKD = split(qkv, self.heads, self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSND, k_BSKD = self.q_norm(q_BSND), self.k_norm(k_BSKD)
        if cos is not None:
            q_BSND, k_BSKD = self.ops.rope(q_BSND, k_BSKD, cos, sin, positions=positions_BS)
        return q_BSND, k_BSKD, v_BSKD


class GeluMLP(nn.Module):
    """down(gelu(up(x))), the GPT-2 way."""

    def __init__(self, cfg: Model, make: Make) -> None:
        super().__init__()
        self.ops = make.ops
        self.up = make.linear("mlp.up", cfg.hidden, cfg.ffn, cfg.bias)
        self.down = make.linear("mlp.down", cfg.ffn, cfg.hidden, cfg.bias)

    def forward(self, x_BSH: Tensor, again: Again, forget: bool) -> Tensor:
        with forgetting(x_BSH, again):
            up_BSF = self.up(x_BSH)
        y_BSF, kept = self.ops.gelu(up_BSF), up_BSF.detach()
        with forgetting(y_BSF, (lambda: self.ops.gelu(kept)) if forget else None):
            return self.down(y_BSF)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202); gate and up are one product."""

    def __init__(self, cfg: Model, make: Make) -> None:
        super().__init__()
        self.activation = {"swiglu": make.ops.swiglu, "geglu": make.ops.geglu}[cfg.activation]
        self.gate_up = make.linear("mlp.gate_up", cfg.hidden, 2 * cfg.ffn, cfg.bias)
        self.down = make.linear("mlp.down", cfg.ffn, cfg.hidden, cfg.bias)

    def forward(self, x_BSH: Tensor, again: Again, forget: bool) -> Tensor:
        with forgetting(x_BSH, again):
            gate_up_BSF = self.gate_up(x_BSH)
        y_BSF, kept = self.activation(gate_up_BSF), gate_up_BSF.detach()
        with forgetting(y_BSF, (lambda: self.activation(kept)) if forget else None):
            return self.down(y_BSF)


class Block(nn.Module):
    def __init__(self, cfg: Model, make: Make) -> None:
        super().__init__()
        norm = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[cfg.norm]
        mlp = GatedMLP if cfg.gated else GeluMLP
        self.norm1, self.attn = norm(cfg, make), Attention(cfg, make)
        self.norm2, self.mlp = norm(cfg, make), mlp(cfg, make)

    def forward(
        self,
        x_BSH: Tensor,
        residual_BSH: Tensor | None,
        places: Places,
        cache: LayerCache | None = None,
        recompute: Recompute = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """One layer on the stream x + residual (residual None: x alone); returns the next such pair."""
        y_BSH, first_BSH = self.norm1(x_BSH, residual_BSH)
        again = _again(self.norm1, first_BSH) if recompute.norm else None
        x_BSH = self.attn(y_BSH, again, places, cache)
        y_BSH, second_BSH = self.norm2(x_BSH, first_BSH)
        again = _again(self.norm2, second_BSH) if recompute.norm else None
        return self.mlp(y_BSH, again, recompute.activation), second_BSH


class Piece(NamedTuple):
    """A run of consecutive parts of the model: the embedding if `first`, these blocks, norm and head if `last`."""

    first: bool
    layers: range
    last: bool


class Transformer(nn.Module):
    """A language model of cfg's shape. Parameters are raw memory until `initialize(model, seed)` or `load_state`.

    `ops` is what `megapre.kernels.choose(device)` returned. With device="meta" nothing is allocated. With `tensor` it
    holds one rank's share of every layer that CUT names; with `piece` it is that piece of the model alone. Parameters
    are named as in the whole model; a last piece of a tied model holds the embedding table too, as its head.
    """

    def __init__(
        self,
        cfg: Model,
        ops: Kernels,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tensor: TensorGroup | None = None,
        piece: Piece | None = None,
        recompute: Recompute = NOTHING,
    ) -> None:
        super().__init__()
        self.cfg, self.ops, self.tensor, self.recompute = cfg, ops, tensor, recompute
        self.piece = Piece(True, range(cfg.layers), True) if piece is None else piece
        self.before_use: Callable[[str], None] | None = None
        """Called before parameters are read, with what their names begin with, where they may still be on their way."""
        make = Make(ops, {"dtype": dtype, "device": device}, tensor)
        size = 1 if tensor is None else tensor.size
        own, rows = local(cfg, size), cfg.vocab_padded // size
        first, layers, last = self.piece
        learned = cfg.positions == "learned"
        if first:
            self.embed = VocabEmbedding(rows, cfg.hidden, ops, make.like, tensor)
        self.positions = VocabEmbedding(cfg.context, cfg.hidden, ops, make.like) if first and learned else None
        self.rotary = None if learned else Rotary(cfg, device)
        self.blocks = nn.ModuleList()
        for layer in layers:  # named by their place in the whole model
            self.blocks.add_module(str(layer), Block(own, make))
        if last:
            self.norm = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[cfg.norm](cfg, make)
        self.head = ColumnLinear(cfg.hidden, rows, False, ops, make.like, tensor) if last and not cfg.tied else None
        if last and cfg.tied and not first:
            self.embed = VocabEmbedding(rows, cfg.hidden, ops, make.like, tensor)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [B, S, V] in the model's dtype, of the token after each one.

        tokens: int64 [B, S] below V. positions: int64 [B, S] below cfg.context, default 0 .. S-1 (behind the cache's
        positions if there is one). cu_seqlens: int32 [documents + 1], bounds of documents in the T flattened tokens;
        a token attends within its document only. Raises ModelError for more positions than cfg.context or the cache.
        """
        return self.logits(self.hidden(tokens_BS, positions_BS, cu_seqlens, cache))

    def loss(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        upstream: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, fp32 scalar, summed over tokens whose label is not -100; logits never whole.

        `upstream`: the 0-dim gradient that the backward will bring, where that is known; it saves memory.
        """
        return self.run(None, tokens_BS, labels_BS, positions_BS, cu_seqlens, upstream)

    def run(
        self,
        stream: Tensor | None,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        upstream: Tensor | None = None,
    ) -> Tensor:
        """This piece of the model: from the stream that the piece before returned (None for the first) to the stream,
        [B, S, H] or [T / size, H] with sequence parallelism, and from the last piece to the loss. Arguments as `loss`.
        """
        places = self.places(tokens_BS.shape, positions_BS, cu_seqlens)
        if stream is None:
            self._await("embed.", "positions.")
        x = self.embed_tokens(tokens_BS, places) if stream is None else stream
        x, residual = self.run_blocks(x, places)
        if not self.piece.last:
            return x if residual is None else x + residual
        self._await("norm.", "head.", "embed.")
        return self.loss_of(self.norm(x, residual)[0], labels_BS, upstream)

    def hidden(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The normed stream [B, S, H] that the head reads. Extends the cache."""
        places = self.places(tokens_BS.shape, positions_BS, cu_seqlens, cache)
        x_BSH, residual_BSH = self.run_blocks(self.embed_tokens(tokens_BS, places), places, cache)
        if cache is not None:
            cache.length += tokens_BS.shape[1]
        return self.norm(x_BSH, residual_BSH)[0]

    def places(
        self, shape: torch.Size, positions_BS: Tensor | None, cu_seqlens: Tensor | None, cache: KVCache | None = None
    ) -> Places:
        length = shape[1]
        start = 0 if cache is None else cache.length
        room = self.cfg.context if cache is None else min(self.cfg.context, cache.capacity)
        if start + length > room:
            limit = "the model's context" if room == self.cfg.context else "the cache"
            raise ModelError(
                f"{length} tokens from position {start} on need {start + length} positions, "
                f"but {limit} has {room}; at most {room - start} tokens fit here"
            )
        if self.rotary is None:
            return Places(shape, start, positions_BS, None, None, cu_seqlens)
        if positions_BS is not None:  # they count from 0 whatever the cache holds
            return Places(shape, start, positions_BS, self.rotary.cos, self.rotary.sin, cu_seqlens)
        end = start + length
        return Places(shape, start, None, self.rotary.cos[start:end], self.rotary.sin[start:end], cu_seqlens)

    def embed_tokens(self, tokens_BS: Tensor, places: Places) -> Tensor:
        """The stream that enters the first block."""
        x = self.embed(tokens_BS)
        if self.positions is None:
            return x
        if self.tensor is not None and self.tensor.sequence:
            positions_BS = places.positions_BS
            if positions_BS is None:
                positions_BS = torch.arange(places.start, places.start + places.shape[1], device=x.device)
            return x + self.positions(self.tensor.own(positions_BS.expand(places.shape).flatten()))
        if places.positions_BS is not None:
            return x + self.positions(places.positions_BS)
        return x + self.positions.weight[places.start : places.start + places.shape[1]]

    def run_blocks(self, x: Tensor, places: Places, cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """All blocks of this piece. Returns (x, residual), whose sum is the stream."""
        blocks, residual = list(self.blocks), None
        whole = min(self.recompute.blocks, len(blocks)) if torch.is_grad_enabled() else 0
        for start in range(0, whole, self.recompute.group):
            self._await(*(f"blocks.{layer}." for layer in self.piece.layers[start : start + self.recompute.group]))
            stream = x if residual is None else x + residual
            part = blocks[start : min(start + self.recompute.group, whole)]
            x, residual = checkpoint(_run_in_turn, part, stream, places, use_reentrant=False)
        for index, block in enumerate(blocks[whole:], start=whole):
            self._await(f"blocks.{self.piece.layers[index]}.")
            layer_cache = None if cache is None else cache.layer(index)
            x, residual = block(x, residual, places, layer_cache, self.recompute)
        return x, residual

    def _await(self, *names: str) -> None:
        if self.before_use is not None:
            for name in names:
                self.before_use(name)

    @property
    def head_weight(self) -> Tensor:
        """[Vp, H]; the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, y_BSH: Tensor) -> Tensor:
        assert self.tensor is None, "logits are for sampling, which runs on one rank"
        return F.linear(y_BSH, self.head_weight[: self.cfg.vocab])

    def loss_of(self, y: Tensor, labels_BS: Tensor, upstream: Tensor | None = None) -> Tensor:
        """The loss of the normed stream. A head that is cut gives every rank the same."""
        vocab, weight, labels_T = self.cfg.vocab, self.head_weight, labels_BS.flatten()
        y_TH = enter(y.view(-1, self.cfg.hidden), self.tensor)
        if self.tensor is None:
            return self.ops.linear_cross_entropy(y_TH, weight, labels_T, vocab=vocab, upstream=upstream)
        gather, start = self.tensor.gather_statistics, self.tensor.rank * weight.shape[0]
        return self.ops.vocab_parallel_linear_cross_entropy(
            y_TH, weight, labels_T, gather, vocab_start=start, vocab=vocab, upstream=upstream
        )


def _again(norm: nn.Module, stream: Tensor) -> Callable[[], Tensor]:
    kept = stream.detach()  # the norm keeps it too
    return lambda: norm(kept, None)[0]


def _run_in_turn(blocks: list[Block], x: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
    residual = None
    for block in blocks:
        x, residual = block(x, residual, places)
    return x, residual
