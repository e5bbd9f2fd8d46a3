"""Bytes of activations on one rank: what a layer, a chunk and the ends of the model keep for their backward.

Two counts live here. `layer_activations` counts what megapre's own layer keeps; tests hold it, and what stages make of
it, against what is alive, byte for byte. `megatron_layer_activations` is the published count of a GPT layer with
dropout and whole attention scores (Korthikanti et al. 2022), which published figures refer to.

Legend: B micro-batch, S sequence, T = B*S tokens, H hidden, N query heads, K key-value heads, D head dim, F ffn width,
Vp padded vocabulary, t tensor parallel ranks.
"""

from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

from ..config import Config, Model
from ..schedule.held import Kept

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
MAX_LOGITS = {"cpu": 2**25, "cuda": 2**29}
"""Elements of the largest chunk of logits that linear_cross_entropy makes, by device."""
LOGITS_ROWS = 256
"""Rows that a chunk has at least."""

Recompute: TypeAlias = Literal["none", "selective", "full"]


def stage_activations(cfg: Config, cut: Sequence[int], device: str = "cpu", fused_loss: bool = True) -> list[Kept]:
    """Of each stage of a model cut into stages of cut[s] layers, for one micro-batch.

    Beside its layers the first stage keeps its tokens, as int64, and with sequence parallelism their learned positions.
    The last keeps the input of the last norm with its statistics and the gradient that the loss hands back, and has
    logits while its forward runs.
    """
    model, layout, tokens, element = cfg.model, cfg.layout, cfg.batch.micro_tokens, ELEMENT[cfg.run.dtype]
    share = layout.tp if layout.sequence_parallel else 1
    norm = tokens * (model.hidden * element + _norm_statistics(model)) // share
    ends = norm + tokens * model.hidden * element
    looked_up = 8 * tokens * (2 if share > 1 and model.positions == "learned" else 1)
    logits = logits_bytes(model, tokens, element, layout.tp, device, fused_loss)
    found = []
    for stage, layers in enumerate(cut):
        kept, at_a_time = chunk_activations(cfg, layers)
        first, last = stage == 0, stage == len(cut) - 1
        found.append(
            Kept(
                whole=kept + looked_up * first + ends * last,
                for_weights=layers * layer_operands(model, tokens, element, layout.tp),
                in_forward=logits * last,
                in_backward=at_a_time,
            )
        )
    return found


def layer_operands(model: Model, tokens: int, element: int, tp: int = 1) -> int:
    """Bytes that one layer keeps between I and W on one of `tp` ranks: inputs of its four products, and the gradients
    of their outputs. Of those that sequence parallelism cuts, the products have what was gathered.
    """
    q = model.heads // tp * model.head_dim
    kv = max(model.kv_heads // tp, 1) * model.head_dim
    f = model.ffn // tp
    return tokens * element * (4 * model.hidden + (q + 2 * kv) + q + (3 * f if model.gated else 2 * f))


def chunk_activations(cfg: Config, layers: int) -> tuple[int, int]:
    """Bytes that a chunk of `layers` layers keeps of a micro-batch, and what it needs besides in its backward: all that
    is within the group of blocks that is recomputed at a time.
    """
    model, layout = cfg.model, cfg.layout
    tokens = cfg.batch.micro_tokens

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
