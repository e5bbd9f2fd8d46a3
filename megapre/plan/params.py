"""How many parameters a model has, and where.

Legend: H hidden, N query heads, K key-value heads, D head dim, F ffn width, V vocabulary, L layers.
"""

from collections.abc import Iterator
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


class Parameter(NamedTuple):
    """`elements` on one rank; `matrix`: whether it has two dimensions, and hence decays."""

    name: str
    elements: int
    matrix: bool


def count(model: Model) -> Parameters:
    """Parameters of the whole model, each once, with the true vocabulary (no padded rows)."""
    one = layer(model)
    table = model.vocab * model.hidden
    return Parameters(
        embedding=table,
        positions=model.context * model.hidden if model.positions == "learned" else 0,
        attention=model.layers * one.attention,
        ffn=model.layers * one.ffn,
        norms=model.layers * one.norms + sum(parameter.elements for parameter in norm_parameters("norm", model)),
        head=0 if model.tied else table,
    )


def layer(model: Model, tp: int = 1) -> Layer:
    """Parameters of one layer on one of `tp` tensor-parallel ranks."""
    of = {"attention": 0, "ffn": 0, "norms": 0}
    matrices = 0
    for name, elements, matrix in layer_parameters(model, tp):
        of["norms" if "norm" in name else "attention" if name.startswith("attn.") else "ffn"] += elements
        matrices += elements if matrix else 0
    return Layer(**of, matrices=matrices)


def layer_parameters(model: Model, tp: int = 1) -> Iterator[Parameter]:
    """Those of one layer on one of `tp` tensor-parallel ranks, named within their block, in the order of use.

    Column-parallel: qkv [(N+2K)D, H], up or gate and up; row-parallel: out [H, ND], down. Their biases are cut with the
    rows, so those of out and down are whole everywhere, as norms are. With K < tp a rank holds one key-value head.
    """
    h, f, q = model.hidden, model.ffn // tp, model.heads // tp * model.head_dim
    qkv = q + 2 * max(model.kv_heads // tp, 1) * model.head_dim
    up, rows = ("mlp.gate_up", 2 * f) if model.gated else ("mlp.up", f)
    yield from norm_parameters("norm1", model)
    yield from _linear("attn.qkv", h, qkv, model.bias)
    if model.qk_norm:
        yield Parameter("attn.q_norm.weight", model.head_dim, False)
        yield Parameter("attn.k_norm.weight", model.head_dim, False)
    yield from _linear("attn.out", q, h, model.bias)
    yield from norm_parameters("norm2", model)
    yield from _linear(up, h, rows, model.bias)
    yield from _linear("mlp.down", f, h, model.bias)


def norm_parameters(name: str, model: Model) -> Iterator[Parameter]:
    """Of one norm over H: a weight, and for layernorm a bias."""
    yield Parameter(f"{name}.weight", model.hidden, False)
    if model.norm == "layernorm" and model.bias:
        yield Parameter(f"{name}.bias", model.hidden, False)


def _linear(name: str, ins: int, outs: int, bias: bool) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", ins * outs, True)
    if bias:
        yield Parameter(f"{name}.bias", outs, False)
