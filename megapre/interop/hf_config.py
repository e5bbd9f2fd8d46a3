"""config.json, read and written, for every architecture: ARCHITECTURES is the list of what there is.

Keys that a file leaves out have the defaults of transformers. Dropout is not part of what a model computes; it is left
out. Everything else that would change the result and that this model cannot do is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from megapre.config import Model, rules
from megapre.interop.errors import InteropError

Config = Mapping[str, Any]


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
        model = Model.model_validate(fields)
        problems = rules.problems({"model": model})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
    if problems:
        raise InteropError("config cannot be mapped:\n  " + "\n  ".join(problems))
    return model


def _read_gpt2(c: Config) -> Model:
    no = Refusals()
    act = c.get("activation_function", "gelu_new")
    no.unless(act in TANH_GELU, c, "activation_function", " or ".join(TANH_GELU))
    no.unless(c.get("scale_attn_weights", True), c, "scale_attn_weights", "true")
    no.unless(not c.get("scale_attn_by_inverse_layer_idx"), c, "scale_attn_by_inverse_layer_idx", "false")
    no.unless(not c.get("add_cross_attention"), c, "add_cross_attention", "false")
    no.settle("GPT2LMHeadModel")
    return _model(
        {
            "family": "gpt2",
            "layers": c.get("n_layer", 12),
            "hidden": c.get("n_embd", 768),
            "heads": c.get("n_head", 12),
            "ffn": c.get("n_inner") or 0,
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
    return _model(
        {
            "family": "llama",
            "layers": c.get("num_hidden_layers", 32),
            "hidden": c.get("hidden_size", 4096),
            "heads": c.get("num_attention_heads", 32),
            "kv_heads": c.get("num_key_value_heads") or 0,  # 0 here and None there: as many as heads
            "head_dim": c.get("head_dim") or (128 if qk_norm else 0),
            "ffn": c.get("intermediate_size", 22016 if qk_norm else 11008),
            "context": c.get("max_position_embeddings", 32768 if qk_norm else 2048),
            "vocab": c.get("vocab_size", 151936 if qk_norm else 32000),
            "norm_eps": c.get("rms_norm_eps", 1e-6),
            "activation": GATES[act],
            "rope_theta": scaling.pop("rope_theta"),
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
