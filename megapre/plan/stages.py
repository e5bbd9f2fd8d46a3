"""What each pipeline stage takes: FLOPs, bytes and, at a rate, seconds. The costs that a schedule is simulated with.

The gradient of a layer's input (I) costs what its forward does and the attention scores once more; that of its weights
(W) the matrices alone; a recomputed block adds its forward to I. The last stage has the head besides, and the first the
embedding, which costs no FLOPs but memory traffic.
"""

from dataclasses import dataclass

from ..config import Config
from ..schedule import Costs, Placement
from . import params
from .activations import ELEMENT, stage_activations
from .partition import StageError, layers_of_stages

MICRO, GIGA = 1e-6, 1e9


@dataclass(frozen=True)
class Rates:
    """What a device reaches, FLOP/s of products and bytes/s of its memory, and the link between two stages."""

    flops: float
    memory: float
    latency: float = 10 * MICRO
    link: float = 50 * GIGA


def stage_costs(cfg: Config, chunks: int, rates: Rates, placement: Placement | None = None) -> Costs:
    """Seconds and bytes of one micro-batch on each of pp * chunks stages, on one tensor-parallel rank. Where the stages
    lie matters to what balances them; None is where the layout's schedule has them.

    Raises StageError where the layers cannot be cut so, or the vocabulary is not known.
    """
    model, layout = cfg.model, cfg.layout
    cut = layers_of_stages(cfg, chunks, placement)
    if model.vocab == 0:
        raise StageError("model: vocab = 0 is that of the data's tokenizer; set model.vocab to count the head")
    stages, tokens = len(cut), cfg.batch.micro_tokens
    activations = stage_activations(cfg, cut)
    share = tokens / (rates.flops * layout.tp)
    matrices = 2 * params.layer(model).matrices * share
    scores = 2 * cfg.batch.seq_length * model.heads * model.head_dim * share  # causal, counted as half
    head = 2 * model.vocab * model.hidden * share
    element = ELEMENT[cfg.run.dtype]
    stream = tokens * model.hidden / (layout.tp if layout.sequence_parallel else 1)
    look_up = 2 * element * stream / rates.memory
    add_up = (element + 2 * 4) * stream / rates.memory  # fp32 gradients are read and written
    again = [min(layout.recompute_layers or n, n) if "block" in layout.recompute else 0 for n in cut]

    def each(layer: float, first: float = 0.0, last: float = 0.0) -> list[float]:
        return [n * layer + first * (stage == 0) + last * (stage == stages - 1) for stage, n in enumerate(cut)]

    return Costs.of(
        stages,
        forward=each(matrices + scores, first=look_up, last=head),
        input=[
            cost + n * (matrices + scores)
            for cost, n in zip(each(matrices + 2 * scores, last=head), again, strict=True)
        ],
        weights=each(matrices, first=add_up, last=head),
        message=element * stream,
        kept=[kept.whole for kept in activations],
        kept_for_weights=[kept.for_weights for kept in activations],
        latency=rates.latency,
        bandwidth=rates.link,
    )
