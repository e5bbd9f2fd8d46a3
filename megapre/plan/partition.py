"""Which layers each pipeline stage has: equally many, as many as the user says, or as many as balance the ranks.

A step takes as long as the rank with the most work needs. The head is worth layers (2.4 of Llama 3 8B's 32), so that
equal stages make every other rank wait for the one that holds it.
"""

from collections.abc import Sequence

from ..config import Config
from ..errors import UserError
from ..schedule import Placement, Schedule, holder, named, placement_of
from . import params

FLOPS_PER_BYTE = 148
"""FLOPs that take as long as a byte of memory traffic: half of an H100's bf16 peak over its bandwidth. A constant, for
the cut of a model may not depend on the machine."""


class StageError(UserError):
    """A model that cannot be cut into so many stages."""


def schedule_of(cfg: Config, dp: int) -> Schedule:
    """The order in which a step of `cfg` runs, of `dp` replicas. Raises ScheduleError, and ConfigError where the batch
    cannot be cut so.
    """
    layout = cfg.layout
    return named(layout.schedule, layout.pp, layout.vpp, cfg.batch.micro_batches(dp), layout.group or None)


def layers_of_stages(cfg: Config, chunks: int = 0, placement: Placement | None = None) -> tuple[int, ...]:
    """Layers of each stage in model order, for `chunks` a rank (0: layout.vpp) that lie so (None: as the layout's
    schedule has them).

    These are layout.stages; else balanced with layout.balance; else equal. Raises StageError where the layers cannot be
    cut so, and ScheduleError.
    """
    layout, layers = cfg.layout, cfg.model.layers
    chunks = chunks or layout.vpp
    stages = layout.pp * chunks
    if layout.stages and len(layout.stages) == stages:
        return layout.stages
    if layers < stages or (layers % stages and not layout.balance):
        raise StageError(f"{layers} layers % ({layout.pp} * {chunks}) = {layers % stages}")
    if not layout.balance:
        return (layers // stages,) * stages
    placement = placement or placement_of(layout.schedule)
    ranks = [holder(stage, layout.pp, placement)[0] for stage in range(stages)]
    return balanced(layers, ranks, *costs(cfg))


def costs(cfg: Config) -> tuple[int, int, int]:
    """FLOPs a token, forward and backward, of a layer, of the embedding (its memory traffic) and of the head."""
    model = cfg.model
    vocab = known_vocab(cfg)
    one = 3 * (2 * params.layer(model).matrices + 2 * cfg.batch.seq_length * model.heads * model.head_dim)
    element = 4 if cfg.run.dtype == "fp32" else 2
    embedding = FLOPS_PER_BYTE * (3 * element + 8) * model.hidden  # rows read and written; fp32 gradients added up
    return one, embedding, 6 * vocab * model.hidden


def known_vocab(cfg: Config) -> int:
    """The vocabulary, for the head. Raises StageError where the config leaves it to data that nobody has looked at."""
    if cfg.model.vocab == 0:
        raise StageError(
            "model: vocab = 0 takes the vocabulary from the data, of which no PREFIX.meta.json is here; set "
            "model.vocab to count the head, as in model.vocab=50257, or make the data first"
        )
    return cfg.model.vocab


def balanced(layers: int, ranks: Sequence[int], one: float, first: float, last: float) -> tuple[int, ...]:
    """Layers of each stage such that the rank with the most work has as little as possible, and each stage a layer.

    ranks[s] holds stage s. A layer costs `one`, and the first and the last stage cost `first` and `last` besides. One
    layer after the other goes where the rank, and then the stage, will have the least: for equal layers that is
    optimal. Of equals the later stage gets it, which holds fewer micro-batches at a time.
    """
    stages = len(ranks)
    assert layers >= stages, f"{layers} layers for {stages} stages"
    cut = [1] * stages
    work = [one + first * (s == 0) + last * (s == stages - 1) for s in range(stages)]
    of_rank = [0.0] * (max(ranks) + 1)
    for stage, rank in enumerate(ranks):
        of_rank[rank] += work[stage]
    for _ in range(layers - stages):
        chosen = min(range(stages), key=lambda s: (of_rank[ranks[s]], work[s], -s))
        cut[chosen] += 1
        work[chosen] += one
        of_rank[ranks[chosen]] += one
    return tuple(cut)
