"""What tensor and data parallelism add to a step: the collectives that no product hides.

Tensor parallelism, for each layer, of the stream's T H elements (megapre.parallel.tensor; sp: sequence parallelism):

                    forward               backward
    qkv, up         sp: all-gather        sp: all-gather beside dx; reduce-scatter (else all-reduce) beside dW
    out, down       sp: reduce-scatter    sp: all-gather
                    else: all-reduce      else: nothing

What stands beside a product costs only what it takes longer. Where the backward is split, dW comes with W, too late to
hide anything. With layout.overlap_products a forward's collective goes in t - 1 steps, each beside one of t parts of
the product. Embedding and head have one such collective each way as well.

Data parallelism (megapre.parallel.exchange): a bucket's sum begins when its last gradient is there, in the last
backward of its chunk, and buckets go one after the other; the parameters come back in the order of their use, beside
the next step's forwards. What is not hidden is what ends after the last rank's last action, and what comes after its
use. Not counted is what a step does at its end whatever its schedule: the sums of gradients that ranks of one replica
share (a tied table on two stages), the norm, and the update.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..config import Config
from ..schedule import Timeline
from .activations import ELEMENT
from .buffers import Held, elements
from .flat import BUCKET_ELEMENTS
from .link import Timed
from .params import layer_parameters
from .partition import layers_of_stages


class Shown(NamedTuple):
    """Seconds that F, I and a whole B wait for collectives."""

    forward: float = 0.0
    input: float = 0.0
    backward: float = 0.0

    def times(self, count: float) -> "Shown":
        return Shown(*(count * seconds for seconds in self))

    def plus(self, other: "Shown") -> "Shown":
        return Shown(*(a + b for a, b in zip(self, other, strict=True)))


class OfTensor(NamedTuple):
    """What the collectives of tensor parallelism cost a layer, the embedding and the head, of one micro-batch."""

    layer: Shown = Shown()
    embedding: Shown = Shown()
    head: Shown = Shown()


def of_tensor(cfg: Config, link: Timed, flops: float) -> OfTensor:
    """For a device that multiplies at `flops` FLOP/s, among whose tensor-parallel ranks is `link`."""
    model, layout, tokens = cfg.model, cfg.layout, cfg.batch.micro_tokens
    tp, size = layout.tp, ELEMENT[cfg.run.dtype] * tokens * model.hidden
    if tp == 1:
        return OfTensor()
    product = {
        parameter.name.removesuffix(".weight"): 2 * tokens * parameter.elements / flops
        for parameter in layer_parameters(model, tp)
        if parameter.matrix
    }
    if not layout.sequence_parallel:
        whole = link.seconds("all_reduce", size, tp)
        layer = Shown()
        for name, seconds in product.items():
            column = name not in ("attn.out", "mlp.down")
            layer = layer.plus(Shown(0, whole, max(whole - seconds, 0)) if column else Shown(whole, 0, 0))
        return OfTensor(layer, Shown(whole, 0, 0), Shown(0, whole, whole))
    gather, scatter = link.seconds("all_gather", size, tp), link.seconds("reduce_scatter", size, tp)

    def forward(collective: float, seconds: float) -> float:
        if not layout.overlap_products:
            return collective
        return max(collective - seconds * (tp - 1) / tp, 0)

    layer = Shown()
    for name, seconds in product.items():
        if name in ("attn.out", "mlp.down"):
            layer = layer.plus(Shown(forward(scatter, seconds), gather, gather))
        else:
            again = max(gather - seconds, 0)
            shown = Shown(forward(gather, seconds), again + scatter, again + max(scatter - seconds, 0))
            layer = layer.plus(shown)
    return OfTensor(layer, Shown(scatter, gather, gather), Shown(gather, scatter, scatter))


def of_data(cfg: Config, timeline: Timeline, dp: int, link: Timed) -> float:
    """Seconds that a step of `timeline` takes longer among `dp` replicas with `link` between them.

    Delays of the forwards are counted as if no rank had idle time to take them up, so that this is the most it can be.
    """
    if dp == 1:
        return 0.0
    plan, layout = timeline.schedule, cfg.layout
    cut = layers_of_stages(cfg, plan.chunks, plan.placement)
    sums = "reduce_scatter" if layout.shard_optimizer else "all_reduce"
    late, delay = timeline.makespan, 0.0
    for rank in range(plan.ranks):
        chunks = [
            _Chunk.of(cfg, Held.of([plan.stage_of(rank, chunk)], cut), link, sums, dp) for chunk in range(plan.chunks)
        ]
        late = max(late, _sums_end(timeline, rank, chunks))
        if layout.shard_optimizer:
            delay = max(delay, _delay(timeline, rank, chunks))
    return late - timeline.makespan + delay


class _Chunk(NamedTuple):
    """Buckets of a chunk, and the seconds that each takes to be summed, and to come back."""

    buckets: int
    to_sum: float
    to_gather: float

    @classmethod
    def of(cls, cfg: Config, held: Held, link: Timed, sums: str, dp: int) -> "_Chunk":
        whole, _ = elements(cfg, held, dp)
        buckets = max(round(whole / (cfg.layout.bucket or BUCKET_ELEMENTS)), 1)
        gradients, parameters = (whole * ELEMENT[dtype] / buckets for dtype in (cfg.optim.grad_dtype, cfg.run.dtype))
        return cls(buckets, link.seconds(sums, gradients, dp), link.seconds("all_gather", parameters, dp))


def _sums_end(timeline: Timeline, rank: int, chunks: Sequence[_Chunk]) -> float:
    last: Mapping[int, int] = {a.chunk: at for at, a in enumerate(timeline.schedule[rank]) if a.kind in "BW"}
    free = 0.0
    for chunk, at in sorted(last.items(), key=lambda item: item[1]):
        start, end = timeline.starts[rank][at], timeline.ends[rank][at]
        for bucket in range(1, chunks[chunk].buckets + 1):
            ready = start + (end - start) * bucket / chunks[chunk].buckets
            free = max(free, ready) + chunks[chunk].to_sum
    return free


def _delay(timeline: Timeline, rank: int, chunks: Sequence[_Chunk]) -> float:
    first: dict[int, int] = {}
    for at, action in enumerate(timeline.schedule[rank]):
        first.setdefault(action.chunk, at)
    came = delay = 0.0
    for chunk, at in sorted(first.items(), key=lambda item: item[1]):
        start, end = timeline.starts[rank][at], timeline.ends[rank][at]
        for bucket in range(chunks[chunk].buckets):
            came += chunks[chunk].to_gather
            delay = max(delay, came - start - (end - start) * bucket / chunks[chunk].buckets)
    return delay
