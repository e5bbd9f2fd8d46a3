"""How many parameters a model has, and where.

Legend: H hidden, N query heads, K key-value heads, D head dim, F ffn width, V vocabulary, L layers.
"""

from typing import NamedTuple

from ..config import Model


class Parameters(NamedTuple):
    """Parameters by part. `sum()` is the total; `head` is 0 where it is tied to the embedding."""

    embedding: int
    positions: int
    attention: int
    ffn: int
    norms: int
    head: int


class Layer(NamedTuple):
    """Parameters of one layer; `matrices` are those of attention and ffn that are multiplied with, without biases."""

    attention: int
    ffn: int
    norms: int
    matrices: int


def count(model: Model) -> Parameters:
    """Parameters of the whole model, each once, with the true vocabulary (no padded rows)."""
    one = layer(model)
    table = model.vocab * model.hidden
    return Parameters(
        embedding=table,
        positions=model.context * model.hidden if model.positions == "learned" else 0,
        attention=model.layers * one.attention,
        ffn=model.layers * one.ffn,
        norms=model.layers * one.norms + norm(model),
        head=0 if model.tied else table,
    )


def norm(model: Model) -> int:
    """Parameters of one norm over H: a weight, and for layernorm a bias."""
    return model.hidden * (2 if model.norm == "layernorm" and model.bias else 1)


def layer(model: Model, tp: int = 1) -> Layer:
    """Parameters of one layer on one of `tp` tensor-parallel ranks.

    Column-parallel: qkv [(N+2K)D, H], up or gate and up; row-parallel: out [H, ND], down. Their biases are cut with the
    rows, so those of out and down are whole everywhere, as norms are. With K < tp a rank holds one key-value head.
    """
    h, f = model.hidden, model.ffn // tp
    q = model.heads // tp * model.head_dim
    qkv = q + 2 * max(model.kv_heads // tp, 1) * model.head_dim
    up = 2 * f if model.gated else f
    attention, ffn = h * qkv + q * h, h * up + f * h
    bias = 1 if model.bias else 0
    return Layer(
        attention=attention + bias * (qkv + h),
        ffn=ffn + bias * (up + h),
        norms=2 * norm(model) + (2 * model.head_dim if model.qk_norm else 0),
        matrices=attention + ffn,
    )
