"""Which tensor there is which here, for every family: a list of pieces, and the two ways along it.

Tensors only change their names and their grouping: q, k and v become one matrix, gate and up another, and GPT-2's
Conv1D holds the transpose. So the way there and back is bitwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megapre.config import Model
from megapre.interop.errors import InteropError

State = Mapping[str, Tensor]


class Piece(NamedTuple):
    """One tensor here and the tensors there that it is made of, stacked along the output dim."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False


def pieces(model: Model) -> list[Piece]:
    return _gpt2_pieces(model) if model.positions == "learned" else _llama_pieces(model)


def _gpt2_pieces(m: Model) -> list[Piece]:
    def plain(ours: str, theirs: str, rows: int, transposed: bool = False) -> list[Piece]:
        return [Piece(ours, (theirs,), (rows,), transposed)]

    table = plain("embed.weight", "transformer.wte.weight", m.vocab)
    table += plain("positions.weight", "transformer.wpe.weight", m.context)
    for i in range(m.layers):
        here, there = f"blocks.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            matrix = kind == "weight"
            table += plain(f"{here}.norm1.{kind}", f"{there}.ln_1.{kind}", m.hidden)
            table += plain(f"{here}.attn.qkv.{kind}", f"{there}.attn.c_attn.{kind}", 3 * m.hidden, matrix)
            table += plain(f"{here}.attn.out.{kind}", f"{there}.attn.c_proj.{kind}", m.hidden, matrix)
            table += plain(f"{here}.norm2.{kind}", f"{there}.ln_2.{kind}", m.hidden)
            table += plain(f"{here}.mlp.up.{kind}", f"{there}.mlp.c_fc.{kind}", m.ffn, matrix)
            table += plain(f"{here}.mlp.down.{kind}", f"{there}.mlp.c_proj.{kind}", m.hidden, matrix)
    table += plain("norm.weight", "transformer.ln_f.weight", m.hidden)
    table += plain("norm.bias", "transformer.ln_f.bias", m.hidden)
    return table + ([] if m.tied else plain("head.weight", "lm_head.weight", m.vocab))


def _llama_pieces(m: Model) -> list[Piece]:
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    table = [Piece("embed.weight", ("model.embed_tokens.weight",), (m.vocab,))]
    for i in range(m.layers):
        here, there = f"blocks.{i}", f"model.layers.{i}"
        attn, mlp = f"{there}.self_attn", f"{there}.mlp"
        table.append(Piece(f"{here}.norm1.weight", (f"{there}.input_layernorm.weight",), (m.hidden,)))
        for kind in ("weight", "bias") if m.bias else ("weight",):
            qkv = tuple(f"{attn}.{x}_proj.{kind}" for x in "qkv")
            gate_up = (f"{mlp}.gate_proj.{kind}", f"{mlp}.up_proj.{kind}")
            table.append(Piece(f"{here}.attn.qkv.{kind}", qkv, (q, kv, kv)))
            table.append(Piece(f"{here}.attn.out.{kind}", (f"{attn}.o_proj.{kind}",), (m.hidden,)))
            table.append(Piece(f"{here}.mlp.gate_up.{kind}", gate_up, (m.ffn, m.ffn)))
            table.append(Piece(f"{here}.mlp.down.{kind}", (f"{mlp}.down_proj.{kind}",), (m.hidden,)))
        for x in "qk" if m.qk_norm else "":
            table.append(Piece(f"{here}.attn.{x}_norm.weight", (f"{attn}.{x}_norm.weight",), (m.head_dim,)))
        table.append(Piece(f"{here}.norm2.weight", (f"{there}.post_attention_layernorm.weight",), (m.hidden,)))
    table.append(Piece("norm.weight", ("model.norm.weight",), (m.hidden,)))
    return table + ([] if m.tied else [Piece("head.weight", ("lm_head.weight",), (m.vocab,))])


def only_weights(state: State, model: Model) -> dict[str, Tensor]:
    """Without what is no weight: mask and frequency buffers of old checkpoints, the second name of a tied matrix."""
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    kept = {name: value for name, value in state.items() if not name.endswith(buffers)}
    if model.positions == "learned" and "wte.weight" in kept:  # saved from GPT2Model, without the head's wrapper
        kept = {name if name == "lm_head.weight" else f"transformer.{name}": value for name, value in kept.items()}
    embed = kept.get("transformer.wte.weight" if model.positions == "learned" else "model.embed_tokens.weight")
    head = kept.get("lm_head.weight")
    if model.tied and head is not None and embed is not None:
        if not torch.equal(head, embed):
            raise InteropError("config says tie_word_embeddings, but lm_head.weight differs from the embedding")
        del kept["lm_head.weight"]
    return kept


def gather(table: list[Piece], state: State) -> dict[str, Tensor]:
    wanted = {name: piece for piece in table for name in piece.theirs}
    problems = [f"missing: {name}" for name in wanted if name not in state]
    problems += [f"not part of the architecture: {name}" for name in state if name not in wanted]
    for piece in table:
        for name, rows in zip(piece.theirs, piece.rows, strict=True):
            if name in state and state[name].shape[-1 if piece.transposed else 0] != rows:
                problems.append(f"{name} is {tuple(state[name].shape)}; the config implies {rows} outputs")
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InteropError("these weights do not fit their config:\n  " + "\n  ".join(problems[:8]) + more)

    def build(piece: Piece) -> Tensor:
        parts = [state[name].T if piece.transposed else state[name] for name in piece.theirs]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return {piece.ours: build(piece) for piece in table}


def scatter(table: list[Piece], state: State) -> dict[str, Tensor]:
    out = {}
    for piece in table:
        found = state[piece.ours].shape[0] if piece.ours in state else "none"
        if found != sum(piece.rows):
            raise InteropError(f"the model implies {sum(piece.rows)} rows of {piece.ours}; the weights have {found}")
        for name, part in zip(piece.theirs, state[piece.ours].split(piece.rows), strict=True):
            out[name] = part.T.contiguous() if piece.transposed else part.contiguous()
    return out
