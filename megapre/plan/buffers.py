"""The parameters of one rank, in the order of use, and what their flat buffers take (see megapre.parallel.data).

Norms and biases, which do not decay, lie apart from matrices, and those that other ranks of the replica hold too apart
from the others: each such group has buffers, and gaps, of its own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..config import Config, Model
from .flat import BUCKET_ELEMENTS, lay_out
from .params import Parameter, layer_parameters, norm_parameters

OWN, SHARED_BY_ENDS, SHARED_BY_KV, WHOLE, COPIED = range(5)
"""Who else in the replica has a parameter: nobody, the other end of a tied model, ranks with the same key-value head,
all of the tensor-parallel group, each with a part of its gradient (WHOLE) or with all of it (COPIED)."""


class Held(NamedTuple):
    """What a rank holds: so many layers of the model, its embedding (`first`), its last norm and head (`last`)."""

    layers: int
    first: bool
    last: bool

    @classmethod
    def of(cls, stages: Sequence[int], cut: Sequence[int]) -> "Held":
        """Of a rank with these `stages` of a model cut into stages of cut[s] layers."""
        return cls(sum(cut[stage] for stage in stages), 0 in stages, len(cut) - 1 in stages)


def parameters(model: Model, tp: int, held: Held) -> Iterator[Parameter]:
    """Of one of `tp` tensor-parallel ranks, in the order of use. Both ends hold a tied embedding."""
    table = model.vocab_padded // tp * model.hidden
    if held.first:
        yield Parameter("embed.weight", table, True)
        if model.positions == "learned":
            yield Parameter("positions.weight", model.context * model.hidden, True)
    for _ in range(held.layers):
        yield from layer_parameters(model, tp)
    if held.last:
        yield from norm_parameters("norm", model)
        if not model.tied:
            yield Parameter("head.weight", table, True)
        elif not held.first:
            yield Parameter("embed.weight", table, True)


def elements(cfg: Config, held: Held, shards: int) -> tuple[int, int]:
    """Elements of a rank's flat buffers: of parameters or gradients whole, and of what each of `shards` ranks keeps,
    such as moments.
    """
    groups: dict[tuple[bool, int], list[int]] = {}
    for parameter in reversed(list(parameters(cfg.model, cfg.layout.tp, held))):
        groups.setdefault((parameter.matrix, _shared(parameter.name, cfg, held)), []).append(parameter.elements)
    bucket = cfg.layout.bucket or BUCKET_ELEMENTS
    whole = sum(lay_out(sizes, shards, bucket).elements for sizes in groups.values())
    return whole, whole // shards


def _shared(name: str, cfg: Config, held: Held) -> int:
    model, layout = cfg.model, cfg.layout
    if name == "embed.weight" and model.tied and held.first != held.last:
        return SHARED_BY_ENDS
    if name.startswith("attn.qkv.") and layout.tp > model.kv_heads:
        return SHARED_BY_KV
    if layout.tp == 1 or name.startswith(CUT):
        return OWN
    return WHOLE if layout.sequence_parallel or name in OWN_HEADS else COPIED


CUT = ("attn.qkv.", "attn.out.weight", "mlp.up.", "mlp.gate_up.", "mlp.down.weight", "embed.", "head.")
"""Beginnings of the names of parameters whose elements tensor-parallel ranks share out."""
OWN_HEADS = ("attn.q_norm.weight", "attn.k_norm.weight")
"""Whole on every rank, though each sees its own heads alone."""
