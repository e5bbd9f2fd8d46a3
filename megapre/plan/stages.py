"""What each pipeline stage takes: FLOPs, bytes and, at a rate, seconds. The costs that a schedule is simulated with.

The gradient of a layer's input (I) costs what its forward does and the attention scores once more; that of its weights
(W) the matrices alone; a recomputed block adds its forward to I. The last stage has the head besides, and the first the
embedding, which costs no FLOPs but memory traffic. What collectives of tensor parallelism are not hidden come on top
(communication.py).
"""

from dataclasses import dataclass

from ..config import Config
from ..schedule import Costs, Placement
from . import params
from .activations import ELEMENT, stage_activations
from .communication import OfTensor, of_tensor
from .link import Timed
from .partition import known_vocab, layers_of_stages

MICRO, GIGA = 1e-6, 1e9


@dataclass(frozen=True)
class Rates:
    """What a device reaches, FLOP/s of products and bytes/s of its memory, and the link between two stages.

    `tensor`: the link among tensor-parallel ranks; None: their collectives cost nothing.
    """

    flops: float
    memory: float
    latency: float = 10 * MICRO
    link: float = 50 * GIGA
    tensor: Timed | None = None


def stage_costs(cfg: Config, chunks: int, rates: Rates, placement: Placement | None = None) -> Costs:
    """Seconds and bytes of one micro-batch on each of pp * chunks stages, on one tensor-parallel rank. Where the stages
    lie matters to what balances them; None is where the layout's schedule has them.

    Raises StageError where the layers cannot be cut so, or the vocabulary is not known.
    """
    model, layout = cfg.model, cfg.layout
    cut = layers_of_stages(cfg, chunks, placement)
    vocab = known_vocab(cfg)
    stages, tokens = len(cut), cfg.batch.micro_tokens
    activations = stage_activations(cfg, cut)
    share = tokens / (rates.flops * layout.tp)
    matrices = 2 * params.layer(model).matrices * share
    scores = 2 * cfg.batch.seq_length * model.heads * model.head_dim * share  # causal, counted as half
    head = 2 * vocab * model.hidden * share
    element = ELEMENT[cfg.run.dtype]
    stream = tokens * model.hidden / (layout.tp if layout.sequence_parallel else 1)
    look_up = 2 * element * stream / rates.memory
    add_up = (element + 2 * 4) * stream / rates.memory  # fp32 gradients are read and written
    wait = of_tensor(cfg, rates.tensor, rates.flops) if rates.tensor is not None else OfTensor()
    again = [min(layout.recompute_layers or n, n) if "block" in layout.recompute else 0 for n in cut]

    def each(layer: float, first: float = 0.0, last: float = 0.0) -> list[float]:
        return [n * layer + first * (stage == 0) + last * (stage == stages - 1) for stage, n in enumerate(cut)]

    one = matrices + scores + wait.layer.forward
    repeated = [n * one for n in again]
    of_input = each(matrices + 2 * scores, last=head)
    of_weights = each(matrices, first=add_up, last=head)
    wait_i = each(wait.layer.input, wait.embedding.input, wait.head.input)
    wait_b = each(wait.layer.backward, wait.embedding.backward, wait.head.backward)
    return Costs.of(
        stages,
        forward=each(one, first=look_up + wait.embedding.forward, last=head + wait.head.forward),
        input=[sum(parts) for parts in zip(of_input, repeated, wait_i, strict=True)],
        weights=of_weights,
        backward=[sum(parts) for parts in zip(of_input, repeated, of_weights, wait_b, strict=True)],
        message=element * stream,
        kept=[kept.whole for kept in activations],
        kept_for_weights=[kept.for_weights for kept in activations],
        latency=rates.latency,
        bandwidth=rates.link,
    )
