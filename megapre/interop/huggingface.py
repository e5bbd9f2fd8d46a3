"""Hugging Face configs and weights, in and out: GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM.

    model_cfg, state = from_hf(json_of_config, tensors)      config, state = to_hf(model_cfg, state)

Tensors only change their names and their grouping (q, k and v become one matrix, and gate and up; GPT-2's Conv1D holds
the transpose), so the way there and back is bitwise. Everything that would change what the model computes and that this
model cannot do is refused, never dropped. Dropout is not part of what a model computes and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from megapre.config import Model
from megapre.errors import UserError

Config = Mapping[str, Any]
State = Mapping[str, Tensor]


class InteropError(UserError):
    """A config or weights that cannot be mapped one to one."""


class Piece(NamedTuple):
    """One tensor here and the tensors there that it is made of, stacked along the output dim."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False


def from_hf(config: Config, state: State) -> tuple[Model, dict[str, Tensor]]:
    """The model section and weights (true vocabulary, for `model.load_state`) of a Hugging Face model.

    config: the dict of config.json. state: its state dict, on any device, in any dtype.
    Raises InteropError with every feature of the config and every tensor that cannot be mapped.
    """
    names = config.get("architectures") or [ARCHITECTURE_OF.get(str(config.get("model_type")), "none named")]
    if names[0] not in ARCHITECTURES:
        raise InteropError(f"architecture {names[0]} is not known here; there are {', '.join(ARCHITECTURES)}")
    model = ARCHITECTURES[names[0]].read(config)
    return model, _gather(_pieces(model), _only_weights(state, model))


def to_hf(model: Model, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json's dict and the state dict of the Hugging Face model that computes the same.

    state: as `model.export_state` gives it. Split tensors are contiguous; the others share memory with `state`.
    Raises InteropError for a model that no known architecture can express.
    """
    reasons = {name: architecture.lacks(model) for name, architecture in ARCHITECTURES.items()}
    for name, architecture in ARCHITECTURES.items():
        if not reasons[name]:
            return architecture.write(model), _scatter(_pieces(model), state)
    lines = "".join(f"\n  {name} has no {', no '.join(lacks)}" for name, lacks in reasons.items())
    raise InteropError(f"no known Hugging Face architecture computes what this model does:{lines}")


# ---- weights


def _pieces(model: Model) -> list[Piece]:
    return _gpt2_pieces(model) if model.positions == "learned" else _llama_pieces(model)


def _gpt2_pieces(m: Model) -> list[Piece]:
    def plain(ours: str, theirs: str, rows: int, transposed: bool = False) -> list[Piece]:
        return [Piece(ours, (theirs,), (rows,), transposed)]

    pieces = plain("embed.weight", "transformer.wte.weight", m.vocab)
    pieces += plain("positions.weight", "transformer.wpe.weight", m.context)
    for i in range(m.layers):
        here, there = f"blocks.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            matrix = kind == "weight"
            pieces += plain(f"{here}.norm1.{kind}", f"{there}.ln_1.{kind}", m.hidden)
            pieces += plain(f"{here}.attn.qkv.{kind}", f"{there}.attn.c_attn.{kind}", 3 * m.hidden, matrix)
            pieces += plain(f"{here}.attn.out.{kind}", f"{there}.attn.c_proj.{kind}", m.hidden, matrix)
            pieces += plain(f"{here}.norm2.{kind}", f"{there}.ln_2.{kind}", m.hidden)
            pieces += plain(f"{here}.mlp.up.{kind}", f"{there}.mlp.c_fc.{kind}", m.ffn, matrix)
            pieces += plain(f"{here}.mlp.down.{kind}", f"{there}.mlp.c_proj.{kind}", m.hidden, matrix)
    pieces += plain("norm.weight", "transformer.ln_f.weight", m.hidden)
    pieces += plain("norm.bias", "transformer.ln_f.bias", m.hidden)
    return pieces + ([] if m.tied else plain("head.weight", "lm_head.weight", m.vocab))


def _llama_pieces(m: Model) -> list[Piece]:
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    pieces = [Piece("embed.weight", ("model.embed_tokens.weight",), (m.vocab,))]
    for i in range(m.layers):
        here, there = f"blocks.{i}", f"model.layers.{i}"
        attn, mlp = f"{there}.self_attn", f"{there}.mlp"
        pieces.append(Piece(f"{here}.norm1.weight", (f"{there}.input_layernorm.weight",), (m.hidden,)))
        for kind in ("weight", "bias") if m.bias else ("weight",):
            qkv = tuple(f"{attn}.{x}_proj.{kind}" for x in "qkv")
            gate_up = (f"{mlp}.gate_proj.{kind}", f"{mlp}.up_proj.{kind}")
            pieces.append(Piece(f"{here}.attn.qkv.{kind}", qkv, (q, kv, kv)))
            pieces.append(Piece(f"{here}.attn.out.{kind}", (f"{attn}.o_proj.{kind}",), (m.hidden,)))
            pieces.append(Piece(f"{here}.mlp.gate_up.{kind}", gate_up, (m.ffn, m.ffn)))
            pieces.append(Piece(f"{here}.mlp.down.{kind}", (f"{mlp}.down_proj.{kind}",), (m.hidden,)))
        for x in "qk" if m.qk_norm else "":
            pieces.append(Piece(f"{here}.attn.{x}_norm.weight", (f"{attn}.{x}_norm.weight",), (m.head_dim,)))
        pieces.append(Piece(f"{here}.norm2.weight", (f"{there}.post_attention_layernorm.weight",), (m.hidden,)))
    pieces.append(Piece("norm.weight", ("model.norm.weight",), (m.hidden,)))
    return pieces + ([] if m.tied else [Piece("head.weight", ("lm_head.weight",), (m.vocab,))])


def _only_weights(state: State, model: Model) -> dict[str, Tensor]:
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


def _gather(pieces: list[Piece], state: State) -> dict[str, Tensor]:
    wanted = {name: piece for piece in pieces for name in piece.theirs}
    problems = [f"missing: {name}" for name in wanted if name not in state]
    problems += [f"not part of the architecture: {name}" for name in state if name not in wanted]
    for piece in pieces:
        for name, rows in zip(piece.theirs, piece.rows, strict=True):
            if name in state and state[name].shape[-1 if piece.transposed else 0] != rows:
                problems.append(f"{name} is {tuple(state[name].shape)}; the config implies {rows} outputs")
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InteropError("these weights do not fit their config:\n  " + "\n  ".join(problems[:8]) + more)

    def build(piece: Piece) -> Tensor:
        parts = [state[name].T if piece.transposed else state[name] for name in piece.theirs]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return {piece.ours: build(piece) for piece in pieces}


def _scatter(pieces: list[Piece], state: State) -> dict[str, Tensor]:
    out = {}
    for piece in pieces:
        if piece.ours not in state:
            raise InteropError(f"these weights do not fit the model: {piece.ours} is missing")
        for name, part in zip(piece.theirs, state[piece.ours].split(piece.rows), strict=True):
            out[name] = part.T.contiguous() if piece.transposed else part.contiguous()
    return out


# ---- configs


class Refusals(list[str]):
    """Collects what a config asks for and this model cannot do."""

    def unless(self, holds: bool, config: Config, key: str, allowed: str) -> None:
        if not holds:
            self.append(f"{key} = {config.get(key)!r}; possible here: {allowed}")

    def settle(self, architecture: str) -> None:
        if self:
            raise InteropError(f"{architecture} config cannot be mapped:\n  " + "\n  ".join(self))


def _model(fields: dict[str, Any]) -> Model:
    try:
        return Model.model_validate(fields)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise InteropError("config cannot be mapped:\n  " + "\n  ".join(problems)) from None


def _read_gpt2(c: Config) -> Model:
    no = Refusals()
    act = c.get("activation_function", "gelu_new")
    no.unless(act in TANH_GELU, c, "activation_function", " or ".join(TANH_GELU))
    no.unless(c.get("scale_attn_weights", True), c, "scale_attn_weights", "true")
    no.unless(not c.get("scale_attn_by_inverse_layer_idx"), c, "scale_attn_by_inverse_layer_idx", "false")
    no.unless(not c.get("add_cross_attention"), c, "add_cross_attention", "false")
    no.settle("GPT2LMHeadModel")
    hidden = c.get("n_embd", 768)
    return _model(
        {
            "family": "gpt2",
            "layers": c.get("n_layer", 12),
            "hidden": hidden,
            "heads": c.get("n_head", 12),
            "ffn": c.get("n_inner") or 4 * hidden,
            "context": c.get("n_positions", 1024),
            "vocab": c.get("vocab_size", 50257),
            "norm_eps": c.get("layer_norm_epsilon", 1e-5),
            "tied": c.get("tie_word_embeddings", True),
            "init_std": c.get("initializer_range", 0.02),
        }
    )


def _write_gpt2(m: Model) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": m.layers,
        "n_embd": m.hidden,
        "n_head": m.heads,
        "n_inner": m.ffn,
        "n_positions": m.context,
        "vocab_size": m.vocab,
        "layer_norm_epsilon": m.norm_eps,
        "tie_word_embeddings": m.tied,
        "initializer_range": m.init_std,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _lacks_gpt2(m: Model) -> list[str]:
    return _names(
        (m.norm != "layernorm", m.norm),
        (m.positions != "learned", f"{m.positions} positions"),
        (m.gated, m.activation),
        (not m.bias, "way to leave biases out"),
        (m.qk_norm, "qk-norm"),
        (m.kv_heads != m.heads, "grouped queries"),
        (m.heads * m.head_dim != m.hidden, f"head_dim {m.head_dim} beside hidden/heads"),
    )


def _read_llama(c: Config, qk_norm: bool = False) -> Model:
    no = Refusals()
    act = c.get("hidden_act", "silu")
    no.unless(act in GATES, c, "hidden_act", " or ".join(GATES))
    scaling = _read_rope(c, no)
    attention_bias, mlp_bias = bool(c.get("attention_bias", False)), bool(c.get("mlp_bias", False))
    no.unless(attention_bias == mlp_bias, c, "attention_bias", f"{mlp_bias}, as mlp_bias (biases are all or none)")
    sliding = c.get("use_sliding_window", False) or "sliding_attention" in (c.get("layer_types") or ())
    no.unless(not sliding, c, "use_sliding_window", "false, and layer_types all full_attention")
    no.settle("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    hidden, heads = c.get("hidden_size", 4096), c.get("num_attention_heads", 32)
    return _model(
        {
            "family": "llama",
            "layers": c.get("num_hidden_layers", 32),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": c.get("num_key_value_heads") or heads,
            "head_dim": c.get("head_dim") or (128 if qk_norm else hidden // heads),
            "ffn": c.get("intermediate_size", 22016 if qk_norm else 11008),
            "context": c.get("max_position_embeddings", 32768 if qk_norm else 2048),
            "vocab": c.get("vocab_size", 151936 if qk_norm else 32000),
            "norm_eps": c.get("rms_norm_eps", 1e-6),
            "activation": GATES[act],
            "rope_theta": float(scaling.pop("rope_theta")),
            "rope_scaling": scaling or None,
            "bias": attention_bias,
            "tied": c.get("tie_word_embeddings", False),
            "qk_norm": qk_norm,
            "init_std": c.get("initializer_range", 0.02),
        }
    )


def _read_rope(c: Config, no: Refusals) -> dict[str, Any]:
    """rope_theta and the fields of RopeScaling, from transformers 5's rope_parameters or 4's rope_scaling."""
    given = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    out: dict[str, Any] = {"rope_theta": given.get("rope_theta", c.get("rope_theta", 10000.0))}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_FIELDS:
        no.append(f"rope_type = {kind!r}; possible here: {', '.join(ROPE_FIELDS)}")
        return out
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", c.get("max_position_embeddings"))
    fields = ROPE_FIELDS[kind]
    missing = [theirs for theirs in fields.values() if given.get(theirs) is None]
    no.extend(f"rope_type = {kind!r} needs {name}" for name in missing)
    if kind != "default" and not missing:
        out |= {"type": kind, **{ours: given[theirs] for ours, theirs in fields.items()}}
    partial = given.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    no.unless(partial == 1.0, {"partial_rotary_factor": partial}, "partial_rotary_factor", "1.0")
    return out


def _write_llama(m: Model, qk_norm: bool = False) -> dict[str, Any]:
    rope = None
    if m.rope_scaling is not None:
        fields = ROPE_FIELDS[m.rope_scaling.type]
        values = {theirs: getattr(m.rope_scaling, ours) for ours, theirs in fields.items()}
        rope = {"rope_type": m.rope_scaling.type, **values}
    out = {
        "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if qk_norm else "llama",
        "num_hidden_layers": m.layers,
        "hidden_size": m.hidden,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.ffn,
        "max_position_embeddings": m.context,
        "vocab_size": m.vocab,
        "rms_norm_eps": m.norm_eps,
        "hidden_act": next(theirs for theirs, ours in GATES.items() if ours == m.activation),
        "rope_theta": m.rope_theta,  # with rope_scaling: the form that every transformers release reads
        "rope_scaling": rope,
        "attention_bias": m.bias,
        "tie_word_embeddings": m.tied,
        "initializer_range": m.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return out if qk_norm else {**out, "mlp_bias": m.bias}


def _lacks_llama(m: Model, qk_norm: bool = False) -> list[str]:
    return _names(
        (m.norm != "rmsnorm", m.norm),
        (m.positions != "rope", f"{m.positions} positions"),
        (not m.gated, m.activation),
        (m.qk_norm and not qk_norm, "qk-norm"),
        (qk_norm and not m.qk_norm, "way to leave qk-norm out"),
        (qk_norm and m.bias, "biases in the feed-forward layers"),
    )


def _names(*found: tuple[bool, str]) -> list[str]:
    return [name for holds, name in found if holds]


class Architecture(NamedTuple):
    read: Callable[[Config], Model]
    write: Callable[[Model], dict[str, Any]]
    lacks: Callable[[Model], list[str]]


TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
GATES = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
}
ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(_read_gpt2, _write_gpt2, _lacks_gpt2),
    "LlamaForCausalLM": Architecture(_read_llama, _write_llama, _lacks_llama),
    "Qwen3ForCausalLM": Architecture(
        lambda c: _read_llama(c, qk_norm=True),
        lambda m: _write_llama(m, qk_norm=True),
        lambda m: _lacks_llama(m, qk_norm=True),
    ),
}
ARCHITECTURE_OF = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
