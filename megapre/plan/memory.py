"""Bytes that training takes on one rank, by category.

Two counts of activations live here. `layer_activations` counts what megapre's own layer keeps for its backward; a test
holds it against autograd, byte for byte. `megatron_layer_activations` is the published count of a GPT layer with
dropout and whole attention scores (Korthikanti et al. 2022), which published figures refer to.

Legend: B micro-batch, S sequence, T = B*S tokens, H hidden, N query heads, K key-value heads, D head dim, F ffn width,
Vp padded vocabulary, t tensor, p pipeline and d data parallel ranks.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from ..config import Config, Layout, Model
from ..schedule import BUILDERS
from ..schedule.formulas import in_flight
from . import params
from .partition import layers_of_rank

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
MAX_LOGITS = {"cpu": 2**25, "cuda": 2**29}
"""Elements of the largest chunk of logits that linear_cross_entropy makes, by device."""
LOGITS_ROWS = 256
"""Rows that a chunk has at least."""

Recompute: TypeAlias = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step."""

    weights: int
    gradients: int
    master: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def fullest_rank(cfg: Config, dp: int = 1, device: str = "cpu", fused_loss: bool = True) -> Memory:
    """Memory of the pipeline stage that needs most. `dp` counts all ranks that share gradients (dp * cp).

    What the process itself takes (the interpreter, libraries, a CUDA context), allocator fragmentation and what kernels
    hold while they run come on top. The most of the last is attention's on a CPU, which sums dk and dv of a head in
    fp32 for every thread: 8 * seq_length * head_dim bytes a thread, at most twice that.
    """
    stages = (stage_memory(cfg, stage, dp, device, fused_loss) for stage in range(cfg.layout.pp))
    return max(stages, key=lambda memory: memory.total)


def stage_memory(cfg: Config, stage: int, dp: int = 1, device: str = "cpu", fused_loss: bool = True) -> Memory:
    """Memory of one rank of pipeline stage `stage`.

    States: 16-bit weights 2, fp32 gradients 4, fp32 master 4 and moments 8 bytes a parameter, the last two cut over
    `dp`; fp32 weights, and with optim.master = "none" bf16 ones, are their own master. bf16 gradients take 2, bf16
    moments 4.
    """
    model, layout = cfg.model, cfg.layout
    first, last = ends_held(layout, stage)
    layers = layers_of_rank(cfg, stage)
    held = stage_parameters(model, layout.tp, sum(layers), first, last)
    element = ELEMENT[cfg.run.dtype]
    tokens = cfg.batch.micro * cfg.batch.seq_length // layout.cp
    kept, at_a_time = chunk_activations(cfg, max(layers))  # of unequal chunks at most so much
    held_chunks = chunks_in_flight(cfg, stage, dp)
    ends = 0
    if first:  # tokens, as int64
        ends += held_chunks * 8 * tokens
    if last:  # input of the last norm with its statistics, and the gradient that the loss hands back
        ends += tokens * (2 * model.hidden * element + _norm_statistics(model))
    return Memory(
        weights=held * element,
        gradients=held * ELEMENT[cfg.optim.grad_dtype],
        master=0 if element == 4 or cfg.optim.master == "none" else -(-held * 4 // dp),
        moments=-(-held * 2 * ELEMENT[cfg.optim.moments] // dp),
        activations=held_chunks * kept + at_a_time + ends,
        logits=logits_bytes(model, tokens, element, layout.tp, device, fused_loss) if last else 0,
    )


def stage_parameters(model: Model, tp: int, layers: int, first: bool, last: bool) -> int:
    """Parameters of one rank with `layers` layers, padded rows of the vocabulary included. Both ends hold a tied
    embedding.
    """
    one = params.layer(model, tp)
    table = -(-model.vocab_padded // tp) * model.hidden
    held = layers * (one.attention + one.ffn + one.norms)
    if first:
        held += table + (model.context * model.hidden if model.positions == "learned" else 0)
    if last:
        held += params.norm(model) + (0 if model.tied and first else table)
    return held


def chunks_in_flight(cfg: Config, stage: int, dp: int = 1) -> int:
    """Most chunk activations that pipeline rank `stage` holds at a time, by the schedule's closed form."""
    layout = cfg.layout
    micro_batches = cfg.batch.micro_batches(layout.dp or max(dp // layout.cp, 1))
    return in_flight(layout.schedule, layout.pp, layout.vpp, micro_batches, stage, layout.group or None)


def ends_held(layout: Layout, stage: int) -> tuple[bool, bool]:
    """Whether pipeline rank `stage` holds the embedding, and whether the head: with chunks on a V rank 0 has both."""
    back = BUILDERS[layout.schedule].placement == "v" and layout.vpp % 2 == 0
    return stage == 0, stage == (0 if back else layout.pp - 1)


def chunk_activations(cfg: Config, layers: int) -> tuple[int, int]:
    """Bytes that a chunk of `layers` layers keeps of a micro-batch, and what it needs besides in its backward: all that
    is within the group of blocks that is recomputed at a time.
    """
    model, layout = cfg.model, cfg.layout
    tokens = cfg.batch.micro * cfg.batch.seq_length // layout.cp

    def of_layer(recompute: Collection[str]) -> int:
        return layer_activations(model, tokens, ELEMENT[cfg.run.dtype], layout.tp, layout.sequence_parallel, recompute)

    if "block" not in layout.recompute:
        return layers * of_layer(layout.recompute), 0
    whole = min(layout.recompute_layers or layers, layers)
    kept = -(-whole // layout.recompute_group) * of_layer(("block",))
    others = [name for name in layout.recompute if name != "block"]
    return kept + (layers - whole) * of_layer(others), min(layout.recompute_group, whole) * of_layer(())


def layer_activations(
    model: Model,
    tokens: int,
    element: int,
    tp: int = 1,
    sequence_parallel: bool = True,
    recompute: Collection[str] = (),
) -> int:
    """Bytes that one layer of megapre keeps of `tokens` tokens for its backward, on one of `tp` ranks.

    Kept: the stream before each norm and the norm's output (4H); qkv, in which rope turns q and k in place; the
    attention's output and its log-sum-exp; the ffn's inner values: before and after gelu, or gate, up and their gated
    product. Of `recompute`, "norm" and "activation" save the outputs of those; "block" keeps the stream (H) alone.
    """
    share = tp if sequence_parallel else 1
    if "block" in recompute:
        return tokens * element * model.hidden // share
    q = model.heads // tp * model.head_dim
    kv = max(model.kv_heads // tp, 1) * model.head_dim
    f = model.ffn // tp
    attention = (q + 2 * kv) + q
    heads = model.heads // tp  # log-sum-exp
    if model.qk_norm:  # q and k before their norms and, turned, after them; 1/rms of each head
        attention += q + kv
        heads += model.heads // tp + max(model.kv_heads // tp, 1)
    ffn = (2 * f if model.gated else f) + (0 if "activation" in recompute else f)
    inner = element * (attention + ffn) + 4 * heads
    outer = element * (2 if "norm" in recompute else 4) * model.hidden + 2 * _norm_statistics(model)
    return tokens * inner + tokens * outer // share


def _norm_statistics(model: Model) -> int:
    """Bytes a token that a norm keeps: mean and 1/std, or 1/rms, in fp32."""
    return 8 if model.norm == "layernorm" else 4


def logits_bytes(
    model: Model, tokens: int, element: int, tp: int = 1, device: str = "cpu", fused_loss: bool = True
) -> int:
    """Bytes of head and loss at their peak, which is that of the whole step: every activation is there.

    One chunk of logits and, where cross-entropy is composed of torch's operations instead of one kernel, its fp32
    copies of the chunk. On the CPU the head's gradient is added up where all gradients are; elsewhere it is fp32 of
    its own and, where products do not add in fp32, a chunk's share stands beside it.
    """
    columns = -(-model.vocab_padded // tp)
    most = max(MAX_LOGITS[device] // max(columns, 1), LOGITS_ROWS)
    chunks = max(-(-tokens // most), 1)
    chunk, table = -(-tokens // chunks) * columns, columns * model.hidden
    copies = 0 if fused_loss else 4 * chunk * (3 if element == 2 else 2)
    if device == "cpu":
        return element * chunk + copies
    share = 4 * table if element == 2 else 0
    return element * chunk + 4 * table + max(share, copies)


def megatron_layer_activations(
    tokens: int, seq_length: int, hidden: int, heads: int, tp: int, sequence_parallel: bool, recompute: Recompute
) -> float:
    """Korthikanti et al. 2022, table 2: bytes a GPT layer keeps in 16 bits, with dropout, F = 4H, whole scores.

    none s b h (10 + 24/t + 5 a s / (h t)), with sequence parallelism all over t; selective drops the scores' term;
    full keeps the layer's input, 2 s b h.
    """
    if recompute == "full":
        return 2 * tokens * hidden
    scores = 0 if recompute == "selective" else 5 * heads * seq_length / hidden
    whole = 10 / tp if sequence_parallel else 10
    return tokens * hidden * (whole + (24 + scores) / tp)
