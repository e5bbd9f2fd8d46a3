"""What is measured: for each op its inputs at given sizes, how an implementation is called, and its peers.

    case = build("rms_norm", {"T": 2048, "H": 4096}, "bf16", "cpu")
    case.providers()["native"].function(*case.leaves)

Sizes are named as in cost.py. A provider is a function of the case's leaves that returns the outputs; forward and
backward are taken from it through autograd, so that every provider is measured in the same way. Work in place, and ops
without a gradient, are a function without arguments whose only mode is "step".

A peer is what one would use without this package: `torch` (eager, plainly written), `compile` (torch.compile of the
same), and on CUDA SDPA's backends, flex_attention and Liger where they are there.
"""

import difflib
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import registry
from ..attention import visible
from ..cost import cost
from ..triton import ops as triton

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
Sizes = Mapping[str, int]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PEERS = ("torch", "compile", "fused_fp32", "cudnn", "flash", "efficient", "flex", "liger", "unsharded")
"""Providers that are not implementations of the op, whatever op they serve."""

EPS, IGNORE = 1e-6, -100
MODES = ("forward", "backward", "full", "step")
"""forward: without gradients; backward: of a kept graph; full: both, as in training; step: in place, or no gradient."""


class BenchError(ValueError):
    """An op, size, dtype or provider that there is not; the message names what there is."""


class Provider(NamedTuple):
    """A function of a case's leaves. `why_not` is empty when it can run here; `peer`: not this package's own."""

    function: Function
    why_not: str
    peer: bool


@dataclass
class Case:
    """One op at one size. `work` maps modes to (FLOPs, bytes), `bound` is the ceiling: "copy" or "product"."""

    op: str
    sizes: dict[str, int]
    dtype: str
    device: str
    bound: str
    work: dict[str, tuple[int, int]]
    adapt: Callable[[Function], Function]  # an implementation of the registry -> a function of the leaves
    plain: Callable[[Wrap], Function] | None = None  # the peer in plain torch; the argument is called on what compiles
    leaves: list[Tensor] = field(default_factory=list)
    upstream: list[Tensor] = field(default_factory=list)
    peers: dict[str, Function] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None  # before every call, not timed
    tolerance: float = (
        0.25  # ||a - b|| / ||b||: who is further off computes something else (how exact they are, tests say)
    )

    @property
    def shape(self) -> str:
        """The sizes as the command line takes them: T=2048,H=4096."""
        return ",".join(f"{name}={size}" for name, size in self.sizes.items())

    def providers(self) -> dict[str, Provider]:
        """Every provider by name: implementations in order of preference, then peers."""
        found = {}
        for row in implementations(self.op):
            found[row.name] = Provider(self.adapt(row.function), row.why_not(self.device), row.name in PEERS)
        if self.plain is not None:
            if "torch" not in found:
                found["torch"] = Provider(self.plain(lambda function: function), "", True)
            found["compile"] = Provider(self.plain(compiled), "", True)
        found.update({name: Provider(function, "", True) for name, function in self.peers.items()})
        return found


def compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


def implementations(op: str) -> list[registry.Implementation]:
    """The registry's rows of `op`; for a form in place that it does not list, the registered torch ops."""
    rows = [row for row in registry.IMPLEMENTATIONS if row.op == op]
    if rows or op not in IN_PLACE:
        return rows
    return [registry.Implementation(op, name, function, why_not) for name, function, why_not in IN_PLACE[op]]


def _native_cross_entropy_(*arguments: Any) -> Tensor:
    return torch.ops.megapre.cross_entropy_(*arguments)  # type: ignore[no-any-return]


def _triton_cross_entropy_(*arguments: Any) -> Tensor:
    module = importlib.import_module("..triton.cross_entropy", __package__)
    return module.forward_in_place(*arguments)  # type: ignore[no-any-return]


IN_PLACE: dict[str, list[tuple[str, Function, Callable[[str], str]]]] = {
    "cross_entropy_": [
        ("native", _native_cross_entropy_, registry._needs_native("cross_entropy_")),
        ("triton", _triton_cross_entropy_, triton.why_not),
    ],
}


def build(op: str, sizes: Sizes, dtype: str, device: str) -> Case:
    """The case of `op` at these sizes, on the device. Sizes that the op does not have are left aside.

    BenchError as `check`.
    """
    check(op, sizes, dtype)
    registry.choose(device)  # registers the ops
    torch.manual_seed(0)
    return BUILDERS[op](complete(sizes), dtype, device)


def check(op: str, sizes: Sizes, dtype: str) -> None:
    """BenchError when there is no such op or dtype here, when a size is missing, or when sizes do not fit."""
    if op not in ops():
        raise BenchError(f"there is no op {op!r}{meant(op, ops())}; the ops are {', '.join(ops())}")
    if dtype not in DTYPES:
        raise BenchError(f"there is no dtype {dtype!r}{meant(dtype, DTYPES)}; the dtypes are {', '.join(DTYPES)}")
    known = complete(sizes)
    if any(name not in known for name in NEEDS[op]):
        raise BenchError(f"{op} needs the sizes {', '.join(NEEDS[op])}; given are {', '.join(sizes) or 'none'}")
    heads, k_heads = known.get("N", 1), known.get("K", known.get("N", 1))
    if op == "attention" and heads % k_heads:
        raise BenchError(f"attention: N = {heads} query heads are no multiple of K = {k_heads} key heads")
    if op in ("rope", "rope_") and known["D"] % 2:
        raise BenchError(f"{op}: D = {known['D']}; positions turn pairs, so the head dim must be even")
    if op == "attention" and known.get("documents", 0) > known["S"]:
        raise BenchError(f"attention: {known['documents']} documents do not fit a row of {known['S']} tokens")
    if "V" in NEEDS[op] and known.get("pad", 0) >= known["V"]:
        raise BenchError(f"{op}: pad = {known['pad']} leaves none of V = {known['V']} columns")


def complete(sizes: Sizes) -> dict[str, int]:
    """The sizes with what follows from them: T = B S, S = T where there is one row, D = H / N."""
    found = dict(sizes)
    if "T" not in found and "B" in found and "S" in found:
        found["T"] = found["B"] * found["S"]
    if "T" in found:
        found.setdefault("S", found["T"] // found.get("B", 1))
        found.setdefault("B", max(found["T"] // max(found["S"], 1), 1))
    if "D" not in found and "H" in found and "N" in found:
        found["D"] = found["H"] // found["N"]
    return found


def ops() -> tuple[str, ...]:
    """Ops that can be measured: those of the registry, and their forms in place."""
    return tuple(op for op in BUILDERS if op in registry.OPS or op in IN_PLACE)


def meant(word: str, known: Iterable[str]) -> str:
    """ " (did you mean gelu?)" where a known word is close; else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _randn(shape: tuple[int, ...], dtype: str, device: str, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device).mul_(scale).to(DTYPES[dtype])


def _twice(op: str, sizes: Sizes, dtype: str) -> dict[str, tuple[int, int]]:
    """Work of an op with a backward, by cost.py; full is the sum."""
    forward, backward = cost(op, sizes, dtype), cost(f"{op}_backward", sizes, dtype)
    full = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, "full": full}


def _take(sizes: Sizes, *names: str, **defaults: int) -> dict[str, int]:
    """The sizes that an op has; optional ones only where they are not 0."""
    optional = {name: sizes.get(name, default) for name, default in defaults.items()}
    return {**{name: sizes[name] for name in names}, **{name: size for name, size in optional.items() if size}}


def _liger(device: str, module: str, name: str) -> Any:
    """A Liger autograd function; None off CUDA, and where the package is not there or broken."""
    if device == "cpu":
        return None
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    except Exception:  # a broken peer is a missing peer
        return None


# The ops. Each builder makes the inputs and says how an implementation and a peer are called.


def _norm(op: str, sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = _take(sizes, "T", "H", residual=0)
    rows, width, fused = sizes["T"], sizes["H"], "residual" in sizes
    with_bias = op == "layer_norm"
    leaves = [_randn((rows, width), dtype, device)] + [_randn((width,), dtype, device) for _ in range(1 + with_bias)]
    leaves += [_randn((rows, width), dtype, device)] * fused
    torch_norm: Function = F.layer_norm if with_bias else F.rms_norm

    def adapt(function: Function) -> Function:
        def call(x: Tensor, *rest: Tensor) -> Any:
            return function(x, *rest[: 1 + with_bias], eps=EPS, residual=rest[-1] if fused else None)

        return call

    def own(x: Tensor, *rest: Tensor) -> Any:
        h = x + rest[-1] if fused else x
        y = torch_norm(h, (width,), *rest[: 1 + with_bias], eps=EPS)
        return (y, h) if fused else y

    peers: dict[str, Function] = {}
    name = "LigerLayerNormFunction" if with_bias else "LigerRMSNormFunction"
    if (liger := _liger(device, op, name)) and not fused:
        extra = (EPS,) if with_bias else (EPS, 0.0, "llama", False)
        peers["liger"] = lambda *leaves: liger.apply(*leaves, *extra)
    upstream = [_randn((rows, width), dtype, device) for _ in range(1 + fused)]
    work = _twice(op, sizes, dtype)
    return Case(
        op, sizes, dtype, device, "copy", work, adapt, lambda wrap: wrap(own), leaves, upstream, peers
    )  # fmt: skip


def layer_norm(sizes: Sizes, dtype: str, device: str) -> Case:
    return _norm("layer_norm", sizes, dtype, device)


def rms_norm(sizes: Sizes, dtype: str, device: str) -> Case:
    return _norm("rms_norm", sizes, dtype, device)


def _rope_inputs(sizes: Sizes, dtype: str, device: str) -> tuple[dict[str, int], list[Tensor], tuple[Tensor, Tensor]]:
    length = sizes.get("S", sizes["T"])
    sizes = _take({**sizes, "K": sizes.get("K", sizes["N"])}, "T", "N", "K", "D")
    batch = max(sizes["T"] // length, 1)
    length = sizes["T"] // batch
    sizes["T"] = batch * length
    q_and_k = [_randn((batch, length, sizes[heads], sizes["D"]), dtype, device) for heads in "NK"]
    frequencies = 10000.0 ** -(torch.arange(sizes["D"] // 2, device=device) / (sizes["D"] // 2))
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return sizes, q_and_k, (angles.cos(), angles.sin())


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The way that model code commonly writes it, with tables of the head's whole width in the dtype of x."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def rope(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes, leaves, (cos, sin) = _rope_inputs(sizes, dtype, device)
    wide = [torch.cat((table, table), -1)[None, :, None].to(leaves[0].dtype) for table in (cos, sin)]

    def adapt(function: Function) -> Function:
        return lambda q, k: function(q, k, cos, sin)

    def own(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _rotate_half(q, *wide), _rotate_half(k, *wide)

    upstream = [torch.randn_like(leaf) for leaf in leaves]
    work = _twice("rope", sizes, dtype)
    return Case("rope", sizes, dtype, device, "copy", work, adapt, lambda wrap: wrap(own), leaves, upstream)


def rope_(sizes: Sizes, dtype: str, device: str) -> Case:
    """Queries and keys turned where they lie in the joined heads [B, S, N + 2K, D] of one projection."""
    sizes, (q, k), (cos, sin) = _rope_inputs(sizes, dtype, device)
    heads, k_heads = sizes["N"], sizes["K"]
    fresh = torch.cat((q, k, torch.randn_like(k)), 2)
    qkv = fresh.clone()
    wide = [torch.cat((table, table), -1)[None, :, None].to(q.dtype) for table in (cos, sin)]

    def adapt(function: Function) -> Function:
        return lambda: list(function(qkv, heads, k_heads, cos, sin))

    def plain(wrap: Wrap) -> Function:
        rotate = wrap(lambda q, k: [_rotate_half(q, *wide), _rotate_half(k, *wide)])

        def step() -> list[Tensor]:
            q, k, v = qkv.split((heads, k_heads, k_heads), dim=2)
            return [*rotate(q, k), v]

        return step

    work = {"step": cost("rope", sizes, dtype)}
    return Case("rope_", sizes, dtype, device, "copy", work, adapt, plain, prepare=_refill([qkv], [fresh]))


def _refill(targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
    def prepare() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return prepare


def gelu(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = _take(sizes, "T", "F")
    leaves = [_randn((sizes["T"], sizes["F"]), dtype, device), _randn((sizes["F"],), dtype, device)]

    def own(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    upstream = [torch.randn_like(leaves[0])]
    work = _twice("gelu", sizes, dtype)
    return Case("gelu", sizes, dtype, device, "copy", work, lambda f: f, lambda wrap: wrap(own), leaves, upstream)


def _gated(op: str, sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = _take(sizes, "T", "F")
    width = sizes["F"]
    x = _randn((sizes["T"], 2 * width), dtype, device)

    def own(x: Tensor) -> Tensor:
        gate, up = x[..., :width], x[..., width:]
        return (F.silu(gate) if op == "swiglu" else F.gelu(gate, approximate="tanh")) * up

    peers: dict[str, Function] = {}
    module, name = ("swiglu", "LigerSiLUMulFunction") if op == "swiglu" else ("geglu", "LigerGELUMulFunction")
    if liger := _liger(device, module, name):
        peers["liger"] = lambda x: liger.apply(x[..., :width], x[..., width:])
    upstream = [_randn((sizes["T"], width), dtype, device)]
    work = _twice(op, sizes, dtype)
    return Case(op, sizes, dtype, device, "copy", work, lambda f: f, lambda wrap: wrap(own), [x], upstream, peers)


def swiglu(sizes: Sizes, dtype: str, device: str) -> Case:
    return _gated("swiglu", sizes, dtype, device)


def geglu(sizes: Sizes, dtype: str, device: str) -> Case:
    return _gated("geglu", sizes, dtype, device)


def _logits(sizes: Sizes, dtype: str, device: str) -> tuple[dict[str, int], Tensor, Tensor, int]:
    """Sizes, logits, labels, and the columns that exist: `pad` of V do not."""
    sizes = _take(sizes, "T", "V", pad=0)
    vocab = sizes["V"] - sizes.get("pad", 0)
    labels = torch.randint(0, vocab, (sizes["T"],), device=device)
    return sizes, _randn((sizes["T"], sizes["V"]), dtype, device, scale=2.0), labels, vocab


def cross_entropy(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes, logits, labels, vocab = _logits(sizes, dtype, device)

    def adapt(function: Function) -> Function:
        return lambda x: function(x, labels, vocab=vocab)

    def own(x: Tensor) -> Tensor:
        return F.cross_entropy(x[:, :vocab], labels, reduction="none")

    upstream = [torch.full((sizes["T"],), 1.0 / sizes["T"], device=device)]
    work = _twice("cross_entropy", sizes, dtype)
    return Case(
        "cross_entropy", sizes, dtype, device, "copy", work, adapt, lambda wrap: wrap(own), [logits], upstream,
    )  # fmt: skip


def cross_entropy_(sizes: Sizes, dtype: str, device: str) -> Case:
    """Losses, and the gradient in the place of the logits; the peers make it as a second tensor."""
    sizes, fresh, labels, vocab = _logits(sizes, dtype, device)
    logits = fresh.clone()

    def adapt(function: Function) -> Function:
        return lambda: [function(logits, labels, None, IGNORE, 0.0, 0.0, vocab), logits]

    def through(loss: Function) -> Function:
        def step() -> list[Tensor]:
            leaf = fresh.detach().requires_grad_()
            losses = loss(leaf)
            losses = losses[0] if isinstance(losses, tuple) else losses
            return [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]

        return step

    def own(x: Tensor) -> Tensor:
        return F.cross_entropy(x[:, :vocab], labels, reduction="none")

    flops = cost("cross_entropy", sizes, dtype)[0] + cost("cross_entropy_backward", sizes, dtype)[0]
    work = {"step": (flops, cost("cross_entropy_backward", sizes, dtype)[1])}
    return Case(
        "cross_entropy_", sizes, dtype, device, "copy", work, adapt, lambda wrap: through(wrap(own)),
        prepare=_refill([logits], [fresh]),
    )  # fmt: skip


def linear_cross_entropy(sizes: Sizes, dtype: str, device: str) -> Case:
    """Backward alone is no mode of it: the gradients are made in the forward pass."""
    sizes = _take(sizes, "T", "H", "V")
    rows, width, vocab = sizes["T"], sizes["H"], sizes["V"]
    leaves = [_randn((rows, width), dtype, device), _randn((vocab, width), dtype, device, scale=width**-0.5)]
    labels = torch.randint(0, vocab, (rows,), device=device)

    def adapt(function: Function) -> Function:
        return lambda x, weight: function(x, weight, labels)

    def own(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).float(), labels, reduction="sum")

    peers: dict[str, Function] = {}
    if liger := _liger(device, "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"):

        def through_liger(x: Tensor, weight: Tensor) -> Tensor:
            loss = liger.apply(x, weight, labels, None, None, IGNORE, 0.0, 0.0, "sum")
            return loss[0] if isinstance(loss, tuple) else loss  # type: ignore[no-any-return]

        peers["liger"] = through_liger
    upstream = [torch.tensor(1.0 / rows, device=device)]
    work = _twice("linear_cross_entropy", sizes, dtype)
    del work["backward"]
    return Case(
        "linear_cross_entropy", sizes, dtype, device, "product", work, adapt, lambda wrap: wrap(own), leaves, upstream,
        peers,
    )  # fmt: skip


def vocab_parallel_linear_cross_entropy(sizes: Sizes, dtype: str, device: str) -> Case:
    """One shard that holds all of V, to be compared with `unsharded`: linear_cross_entropy as it is in use."""
    whole = linear_cross_entropy(sizes, dtype, device)
    vocab = whole.sizes["V"]
    labels = torch.randint(0, vocab, (whole.sizes["T"],), device=device)

    def adapt(function: Function) -> Function:
        return lambda x, weight: function(x, weight, labels, lambda stats: stats.unsqueeze(0), 0, vocab)

    unsharded = registry.choose(device, None, DTYPES[dtype]).linear_cross_entropy
    peers: dict[str, Function] = {"unsharded": lambda x, weight: unsharded(x, weight, labels)}
    work = _twice("vocab_parallel_linear_cross_entropy", whole.sizes, dtype)
    del work["backward"]
    return Case(
        "vocab_parallel_linear_cross_entropy", whole.sizes, dtype, device, "product", work, adapt, None, whole.leaves,
        whole.upstream, peers,
    )  # fmt: skip


def linear(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = _take(sizes, "T", "I", "O", bias=0)
    rows, ins, outs = sizes["T"], sizes["I"], sizes["O"]
    leaves = [_randn((rows, ins), dtype, device), _randn((outs, ins), dtype, device, scale=ins**-0.5)]
    leaves += [_randn((outs,), dtype, device)] * ("bias" in sizes)
    upstream = [_randn((rows, outs), dtype, device)]
    work = _twice("linear", sizes, dtype)
    return Case(
        "linear", sizes, dtype, device, "product", work, lambda f: f, lambda wrap: wrap(F.linear), leaves, upstream
    )  # fmt: skip


def embedding(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = _take(sizes, "T", "V", "H")
    tokens = torch.randint(0, sizes["V"], (sizes["T"],), device=device)
    leaves = [_randn((sizes["V"], sizes["H"]), dtype, device)]
    upstream = [_randn((sizes["T"], sizes["H"]), dtype, device)]

    def adapt(function: Function) -> Function:
        return lambda weight: function(tokens, weight)

    work = _twice("embedding", sizes, dtype)
    return Case(
        "embedding", sizes, dtype, device, "copy", work, adapt, lambda wrap: wrap(lambda w: F.embedding(tokens, w)),
        leaves, upstream,
    )  # fmt: skip


def attention(sizes: Sizes, dtype: str, device: str) -> Case:
    """Causal. `documents` cuts each row into that many of unequal length; FLOPs are counted inside them."""
    sizes = _take({**sizes, "K": sizes.get("K", sizes["N"])}, "B", "S", "N", "K", "D", documents=0, window=0)
    batch, length, heads, k_heads = (sizes[name] for name in "BSNK")
    shape = (batch, length)
    leaves = [_randn((*shape, n, sizes["D"]), dtype, device) for n in (heads, k_heads, k_heads)]
    window, documents = sizes.get("window"), sizes.get("documents", 0)
    ends = [0, length]
    if documents:
        generator = torch.Generator().manual_seed(0)
        ends = sorted({0, length, *(torch.randperm(length - 1, generator=generator)[: documents - 1] + 1).tolist()})
    cu_seqlens = None
    if documents:
        every = sorted({row * length + end for row in range(batch) for end in ends})
        cu_seqlens = torch.tensor(every, dtype=torch.int32, device=device)
    work: dict[str, tuple[int, int]] = {}
    for start, stop in itertools.pairwise(ends):
        for mode, (flops, moved) in _twice("attention", {**sizes, "S": stop - start}, dtype).items():
            known = work.get(mode, (0, 0))
            work[mode] = (known[0] + flops, known[1] + moved)
    mask = visible(leaves[0], leaves[1], True, cu_seqlens, window) if documents or window else None

    def adapt(function: Function) -> Function:
        return lambda q, k, v: function(q, k, v, cu_seqlens=cu_seqlens, window=window)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        gqa = heads != k_heads
        if mask is not None and gqa and device != "cpu":  # the backends that take a mask take no grouped heads there
            k, v, gqa = k.repeat_interleave(heads // k_heads, 1), v.repeat_interleave(heads // k_heads, 1), False
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        return o.transpose(1, 2)

    peers: dict[str, Function] = {}
    if device != "cpu":
        peers = _flex(cu_seqlens, sizes, device) if documents else {} if window else _backends(own)
    upstream = [torch.randn_like(leaves[0])]
    return Case(
        "attention", sizes, dtype, device, "product", work, adapt, lambda wrap: wrap(own), leaves, upstream, peers
    )  # fmt: skip


def _backends(function: Function) -> dict[str, Function]:
    """SDPA through each of its CUDA backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend: Any) -> Function:
        def call(*leaves: Tensor) -> Any:
            with sdpa_kernel(backend):
                return function(*leaves)

        return call

    names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return {name: through(getattr(SDPBackend, backend)) for name, backend in names.items()}


def _flex(cu_seqlens: Tensor | None, sizes: Sizes, device: str) -> dict[str, Function]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert cu_seqlens is not None, "flex_attention is the peer of documents"
    batch, length = sizes["B"], sizes["S"]
    token = torch.arange(batch * length, device=device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True).view(batch, length)
    block_mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j]), batch, None, length, length, device=device
    )
    attend = compiled(flex_attention)

    def call(*leaves: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in leaves)
        return attend(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)  # type: ignore[no-any-return]

    return {"flex": call}


def adamw_(sizes: Sizes, dtype: str, device: str) -> Case:
    """A step of the optimizer on one flat shard; gradients of `grad_bytes` an element: 4 (fp32, the default) or 2."""
    sizes = _take(sizes, "P", grad_bytes=4)
    count = sizes["P"]
    master, exp_avg = (_randn((count,), "fp32", device) for _ in range(2))
    state = [master, exp_avg, exp_avg.square()]
    param = master if dtype == "fp32" else master.to(DTYPES[dtype])
    fresh = _randn((count,), dtype if sizes["grad_bytes"] == 2 else "fp32", device)
    grad = fresh.clone()
    scalars = {
        "lr": torch.tensor(1e-6, device=device),  # many steps with one gradient: the weights must stay what they are
        "step": torch.tensor(10.0, device=device),
        "grad_scale": torch.tensor(0.5, device=device),
    }
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    start = [t[:65536].clone() for t in (param, *state)]

    def adapt(function: Function) -> Function:
        def step() -> list[Tensor]:
            function(param, *state, grad, **scalars, **numbers)
            return [t[:65536] for t in state]

        return step

    def fused_fp32() -> list[Tensor]:
        torch._fused_adamw_(
            [master], [fp32_grad], [exp_avg], [state[2]], [], [scalars["step"]], lr=1e-6, beta1=0.9, beta2=0.95,
            weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False, grad_scale=two,
        )  # fmt: skip
        return [t[:65536] for t in state]

    two, fp32_grad = torch.tensor(2.0, device=device), fresh.float()

    def prepare() -> None:
        grad.copy_(fresh)  # its content is unspecified after a call
        fp32_grad.copy_(fresh)
        for whole, part in zip((param, *state), start, strict=True):
            whole[:65536] = part

    work = {"step": cost("adamw_", sizes, dtype)}
    return Case(
        "adamw_", sizes, dtype, device, "copy", work, adapt, peers={"fused_fp32": fused_fp32}, prepare=prepare
    )  # fmt: skip


def adamw_stochastic_(sizes: Sizes, dtype: str, device: str) -> Case:
    """A step on a bf16 shard without a master, fp32 gradient; `dtype` is that of the moments, 16 bits meaning bf16."""
    sizes = _take(sizes, "P")
    count, moments = sizes["P"], torch.float32 if dtype == "fp32" else torch.bfloat16
    exp_avg, grad = (_randn((count,), "fp32", device) for _ in range(2))
    state = [_randn((count,), "bf16", device), exp_avg.to(moments), exp_avg.square().to(moments)]
    scalars = {
        "lr": torch.tensor(1e-6, device=device),
        "step": torch.tensor(10.0, device=device),
        "grad_scale": torch.tensor(0.5, device=device),
    }
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "seed": 1, "offset": 0}
    start = [t[:65536].clone() for t in state]

    def adapt(function: Function) -> Function:
        def step() -> list[Tensor]:
            function(*state, grad, **scalars, **numbers)
            return [t[:65536] for t in state]

        return step

    def prepare() -> None:
        for whole, part in zip(state, start, strict=True):
            whole[:65536] = part

    size = "fp32" if dtype == "fp32" else "bf16"
    work = {"step": cost("adamw_stochastic_", sizes, size)}
    return Case("adamw_stochastic_", sizes, dtype, device, "copy", work, adapt, prepare=prepare)


def grad_norm(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = _take(sizes, "P")
    grads = [_randn((part,), dtype, device) for part in (sizes["P"] // 2, sizes["P"] - sizes["P"] // 2)]

    def adapt(function: Function) -> Function:
        return lambda: [function(grads)]

    def plain(wrap: Wrap) -> Function:
        norm = wrap(lambda grads: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        return lambda: [norm(grads)]

    work = {"step": cost("grad_norm", sizes, dtype)}
    return Case("grad_norm", sizes, dtype, device, "copy", work, adapt, plain)


BUILDERS: dict[str, Callable[[Sizes, str, str], Case]] = {
    "linear": linear,
    "embedding": embedding,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "rope": rope,
    "rope_": rope_,
    "gelu": gelu,
    "swiglu": swiglu,
    "geglu": geglu,
    "cross_entropy": cross_entropy,
    "cross_entropy_": cross_entropy_,
    "linear_cross_entropy": linear_cross_entropy,
    "vocab_parallel_linear_cross_entropy": vocab_parallel_linear_cross_entropy,
    "attention": attention,
    "adamw_": adamw_,
    "adamw_stochastic_": adamw_stochastic_,
    "grad_norm": grad_norm,
}
NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("T", "I", "O"),
    "embedding": ("T", "V", "H"),
    "layer_norm": ("T", "H"),
    "rms_norm": ("T", "H"),
    "rope": ("T", "N", "D"),
    "rope_": ("T", "N", "D"),
    "gelu": ("T", "F"),
    "swiglu": ("T", "F"),
    "geglu": ("T", "F"),
    "cross_entropy": ("T", "V"),
    "cross_entropy_": ("T", "V"),
    "linear_cross_entropy": ("T", "H", "V"),
    "vocab_parallel_linear_cross_entropy": ("T", "H", "V"),
    "attention": ("B", "S", "N", "D"),
    "adamw_": ("P",),
    "adamw_stochastic_": ("P",),
    "grad_norm": ("P",),
}
"""The sizes that each op must be given, or that follow from others (`complete`)."""

LEGEND = {
    "T": "tokens",
    "B": "batch",
    "S": "sequence length",
    "H": "hidden",
    "N": "query heads",
    "K": "key heads",
    "D": "head dim",
    "F": "ffn width",
    "V": "vocabulary",
    "P": "parameters",
    "I": "inputs of linear",
    "O": "outputs of linear",
    "residual": "1: a norm adds one",
    "bias": "1: linear adds one",
    "pad": "columns of V that do not exist",
    "documents": "documents in each row",
    "window": "keys that a query sees",
    "grad_bytes": "of a gradient's element: 4 or 2",
}
"""Every size there is."""


def distance(got: Tensor, known: Tensor) -> float:
    """||got - known|| / ||known||; infinite where shapes differ or got holds NaN, which no maximum may lose."""
    if got.shape != known.shape:
        return math.inf
    wide = known.double()
    error = float((got.double() - wide).norm() / wide.norm().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error
