"""FLOPs and bytes that each op must spend, forward and backward, in pure Python.

    flops, moved = cost("rms_norm", {"T": 8192, "H": 4096}, "bf16")

Sizes are named by the legend: B batch, S sequence length (Sq queries, Sk keys where they differ), T tokens, H hidden,
N query heads, K key heads, D head dim, F ffn width, V vocab, I and O the widths of a linear layer, P parameters,
R ranks.

FLOPs count a multiplication, an addition, and an exp, tanh, sqrt or division as one each. Bytes are the floor of a
perfect kernel: every input read once, every output written once. `op` is a name of the registry, or that with
"_backward" behind it; the backward is what must be done beyond the forward, with the kept tensors read again. Divided
by a machine's rates they give the roofline.
"""

from collections.abc import Callable, Mapping

Shape = Mapping[str, int]
Entry = Callable[[Shape, int], tuple[int, int]]

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def cost(op: str, shape: Shape, dtype: str) -> tuple[int, int]:
    """(FLOPs, bytes) of one call of `op`.

    `shape` maps sizes to numbers, dtype is one of bf16, fp16, fp32, fp64. ValueError when op or dtype is unknown or a
    size is missing.
    """
    if op not in ENTRIES:
        raise ValueError(f"cost: there is no op {op!r}; the ops are {', '.join(ENTRIES)}")
    if dtype not in BYTES:
        raise ValueError(f"cost: there is no dtype {dtype!r}; the dtypes are {', '.join(BYTES)}")
    try:
        return ENTRIES[op](shape, BYTES[dtype])
    except KeyError as missing:
        raise ValueError(f"cost: {op} needs the size {missing}; given are {', '.join(shape) or 'none'}") from None


def _rows(flops: int, width: str, passes: int, fp32_per_row: int = 0) -> Entry:
    """An op over T rows: FLOPs and passes over memory for each element of a row, and fp32 values kept for each row."""

    def entry(shape: Shape, size: int) -> tuple[int, int]:
        elements = shape["T"] * shape[width]
        return flops * elements, passes * elements * size + 4 * fp32_per_row * shape["T"]

    return entry


def _norm(flops: int, passes: int, residual_passes: int, fp32_per_row: int) -> Entry:
    """A norm over [T, H]; shape["residual"] = 1 adds the fused residual: one FLOP an element and `residual_passes`."""

    def entry(shape: Shape, size: int) -> tuple[int, int]:
        elements, residual = shape["T"] * shape["H"], shape.get("residual", 0)
        moved = (passes + residual_passes * residual) * elements * size + 4 * fp32_per_row * shape["T"]
        return (flops + residual) * elements, moved

    return entry


def _rope(shape: Shape, size: int) -> tuple[int, int]:
    elements = shape["T"] * (shape["N"] + shape["K"]) * shape["D"]
    return 3 * elements, 2 * elements * size


def _rope_qkv_backward(shape: Shape, size: int) -> tuple[int, int]:
    flops, moved = _rope(shape, size)
    return flops, moved + 2 * shape["T"] * shape["K"] * shape["D"] * size  # the gradient of v moves too


def pairs(shape: Shape) -> int:
    """Visible (query, key) pairs of one head and one sequence.

    Sizes: S, or Sq and Sk; "causal" 1 (the default) or 0; "window" (0: none).
    """
    queries, keys = shape.get("Sq") or shape["S"], shape.get("Sk") or shape["S"]
    window = shape.get("window") or keys
    if not shape.get("causal", 1):
        return sum(min(keys - 1, at + window - 1) - max(0, at - window + 1) + 1 for at in range(keys - queries, keys))
    ramp_start, ramp_stop = keys - queries + 1, min(keys, window)  # a query at p sees min(p + 1, window) keys
    ramp = max(ramp_stop - ramp_start + 1, 0)
    return (ramp_start + ramp_stop) * ramp // 2 + window * (queries - ramp)


def _attention(products: int, q_passes: int, k_passes: int) -> Entry:
    """`products` of 2 D FLOPs a pair; passes over tensors of q's and of k's size; lse in fp32."""

    def entry(shape: Shape, size: int) -> tuple[int, int]:
        queries, keys = shape.get("Sq") or shape["S"], shape.get("Sk") or shape["S"]
        batch, heads, key_heads, dim = shape["B"], shape["N"], shape["K"], shape["D"]
        flops = 2 * products * dim * pairs(shape) * batch * heads
        moved = (q_passes * queries * heads + k_passes * keys * key_heads) * batch * dim * size
        return flops, moved + 4 * batch * heads * queries

    return entry


def _embedding(shape: Shape, size: int) -> tuple[int, int]:
    elements = shape["T"] * shape["H"]
    return 0, 2 * elements * size + 8 * shape["T"]


def _embedding_backward(shape: Shape, size: int) -> tuple[int, int]:
    # dy in, and as many fp32 sums added to; where they lie is the owner's to have cleared.
    elements = shape["T"] * shape["H"]
    return elements, elements * (size + 8) + 8 * shape["T"]


def _linear(shape: Shape, size: int) -> tuple[int, int]:
    rows, ins, outs = shape["T"], shape["I"], shape["O"]
    return 2 * rows * ins * outs, (rows * ins + ins * outs + rows * outs) * size


def _linear_backward(shape: Shape, size: int) -> tuple[int, int]:
    rows, ins, outs = shape["T"], shape["I"], shape["O"]
    # dy and x and W in, dx out, and dW in fp32.
    return 4 * rows * ins * outs, (2 * rows * ins + ins * outs + rows * outs) * size + 4 * ins * outs


def _linear_cross_entropy(shape: Shape, size: int) -> tuple[int, int]:
    rows, vocab, hidden = shape["T"], shape["V"], shape["H"]
    return rows * vocab * (2 * hidden + 5), (rows * hidden + vocab * hidden) * size


def _linear_cross_entropy_backward(shape: Shape, size: int) -> tuple[int, int]:
    rows, vocab, hidden = shape["T"], shape["V"], shape["H"]
    return rows * vocab * (4 * hidden + 4), (2 * rows * hidden + vocab * hidden) * size + 4 * vocab * hidden


def _vocab_parallel_linear_cross_entropy(shape: Shape, size: int) -> tuple[int, int]:
    # One rank's work: V counts the rows of its shard. The 3 fp32 statistics of a row go out, and "R" ranks' come in.
    flops, moved = _linear_cross_entropy(shape, size)
    return flops, moved + 12 * shape["T"] * (1 + shape.get("R", 1))


def _adamw(shape: Shape, size: int) -> tuple[int, int]:
    # Gradient in, master and two moments in and out in fp32, and the parameter out where it is not the master.
    # shape["grad_bytes"] is the gradient's size an element where it is not the dtype's.
    return 15 * shape["P"], shape["P"] * (shape.get("grad_bytes", size) + 24 + (size if size < 4 else 0))


def _adamw_stochastic(shape: Shape, size: int) -> tuple[int, int]:
    # `size` is that of the moments; the gradient is fp32 unless shape["grad_bytes"] says otherwise. 16 bits of Philox
    # are 10 rounds of 8 operations over 8 elements.
    draws = 1 if size == 4 else 3
    return (15 + draws * 14) * shape["P"], shape["P"] * (shape.get("grad_bytes", 4) + 4 + 4 * size)


def _grad_norm(shape: Shape, size: int) -> tuple[int, int]:
    return 2 * shape["P"], shape["P"] * size


ENTRIES: dict[str, Entry] = {
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "linear": _linear,
    "linear_backward": _linear_backward,
    "layer_norm": _norm(8, passes=2, residual_passes=2, fp32_per_row=2),
    "layer_norm_backward": _norm(14, passes=3, residual_passes=1, fp32_per_row=2),
    "rms_norm": _norm(4, passes=2, residual_passes=2, fp32_per_row=1),
    "rms_norm_backward": _norm(11, passes=3, residual_passes=1, fp32_per_row=1),
    "rope": _rope,
    "rope_backward": _rope,
    "rope_": _rope,
    "rope__backward": _rope_qkv_backward,
    "gelu": _rows(15, "F", passes=2),
    "gelu_backward": _rows(25, "F", passes=3),
    "swiglu": _rows(6, "F", passes=3),
    "swiglu_backward": _rows(12, "F", passes=5),
    "geglu": _rows(16, "F", passes=3),
    "geglu_backward": _rows(28, "F", passes=5),
    "cross_entropy": _rows(5, "V", passes=1, fp32_per_row=2),
    "cross_entropy_backward": _rows(4, "V", passes=2, fp32_per_row=2),
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward,
    "vocab_parallel_linear_cross_entropy": _vocab_parallel_linear_cross_entropy,
    "vocab_parallel_linear_cross_entropy_backward": _linear_cross_entropy_backward,
    "attention": _attention(2, q_passes=2, k_passes=2),
    "attention_backward": _attention(5, q_passes=4, k_passes=4),
    "adamw_": _adamw,
    "adamw_stochastic_": _adamw_stochastic,
    "grad_norm": _grad_norm,
}
