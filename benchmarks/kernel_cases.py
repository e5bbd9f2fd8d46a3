"""What kernels_gpu.py measures: for each op and size, its inputs, its exact results, and the providers that compute it.

A case is built on the device when its turn comes. A provider is a function of the case's leaves that returns the
outputs; forward and backward are taken from it through autograd, so every provider is measured in the same way. Work
in place, and ops without a gradient, are one function without inputs ("step").
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels
from megapre.kernels import attention as attention_reference
from megapre.kernels import cost
from megapre.kernels import cross_entropy as ce_reference
from megapre.kernels.bench import sets
from megapre.kernels.triton import cross_entropy as triton_ce
from megapre.kernels.triton import ops
from megapre.kernels.triton import vocab_parallel as triton_vp

Function = Callable[..., Any]
DEVICE = "cuda"
BF16 = torch.bfloat16


@dataclass
class Case:
    """One op at one size. `work` maps modes (forward, backward, full, step) to (FLOPs, bytes)."""

    op: str
    size: str
    work: dict[str, tuple[int, int]]
    ceiling: str  # "copy" or "product"
    leaves: list[Tensor]
    providers: dict[str, Function]
    upstream: Tensor | None = None
    exact: Callable[[], list[Tensor | None]] | None = None  # outputs, then gradients of leaves; None is not compared
    view: Callable[[list[Tensor]], list[Tensor]] = field(default=lambda results: results)  # the part `exact` speaks of
    prepare: Callable[[], None] | None = None  # before every call, not timed
    tolerance: float = 1e-2


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE, dtype=torch.float32) * scale).to(dtype)


def exact_of(function: Function, leaves: list[Tensor], upstream: Tensor) -> Callable[[], list[Tensor | None]]:
    """Outputs and gradients of `function` on fp32 copies of the inputs."""

    def run() -> list[Tensor | None]:
        wide = [t.detach().float().requires_grad_() for t in leaves]
        out = function(*wide)
        return [out.detach(), *torch.autograd.grad(out, wide, upstream.float())]

    return run


def liger(name: str, module: str) -> Any:
    """A Liger autograd function, or None where the package is not there."""
    try:
        return getattr(__import__(f"liger_kernel.ops.{module}", fromlist=[name]), name)
    except Exception:  # a broken peer is a missing peer
        return None


def both(op: str, shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {"forward": cost.cost(op, shape, "bf16"), "backward": cost.cost(f"{op}_backward", shape, "bf16")}


def rms_norm(rows: int, width: int, fused: bool = False) -> Case:
    leaves = [randn(rows, width), randn(width), *([randn(rows, width)] if fused else [])]

    def own(x: Tensor, w: Tensor, *r: Tensor) -> Tensor:
        h = x + r[0] if r else x
        return F.rms_norm(h, (width,), w, 1e-6)

    def ours(x: Tensor, w: Tensor, *r: Tensor) -> Any:
        y = ops.rms_norm(x, w, 1e-6, *r)
        return y[0] if r else y

    providers: dict[str, Function] = {"triton": ours, "torch": own, "compile": own}
    peer = liger("LigerRMSNormFunction", "rms_norm")
    if peer and not fused:
        providers["liger"] = lambda x, w: peer.apply(x, w, 1e-6, 0.0, "llama", False)
    upstream = randn(rows, width)
    work = both("rms_norm", {"T": rows, "H": width, "residual": int(fused)})
    if fused:  # only y has an upstream gradient here: no dh is read
        work["backward"] = cost.cost("rms_norm_backward", {"T": rows, "H": width}, "bf16")
    size = f"{rows}x{width}" + (" +residual" if fused else "")
    # h is rounded to bf16 before the norm, which an fp32 reference of the sum does not do: a looser comparison
    exact = exact_of(lambda x, w, *r: own(h_of(x, *r), w), leaves, upstream)
    return Case("rms_norm", size, work, "copy", leaves, providers, upstream, exact)


def h_of(x: Tensor, *residual: Tensor) -> Tensor:
    """x + residual rounded as bf16 would, with the gradient of the sum."""
    if not residual:
        return x
    h = x + residual[0]
    return h + (h.to(BF16).float() - h).detach()


def layer_norm(rows: int, width: int) -> Case:
    leaves = [randn(rows, width), randn(width), randn(width)]

    def own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), w, b, 1e-5)

    providers: dict[str, Function] = {"triton": lambda *t: ops.layer_norm(*t), "torch": own, "compile": own}
    peer = liger("LigerLayerNormFunction", "layer_norm")
    if peer:
        providers["liger"] = lambda x, w, b: peer.apply(x, w, b, 1e-5)
    upstream = randn(rows, width)
    work = both("layer_norm", {"T": rows, "H": width})
    return Case(
        "layer_norm", f"{rows}x{width}", work, "copy", leaves, providers, upstream, exact_of(own, leaves, upstream)
    )


def swiglu(rows: int, width: int) -> Case:
    leaves = [randn(rows, 2 * width)]

    def own(x: Tensor) -> Tensor:
        return F.silu(x[..., :width]) * x[..., width:]

    providers: dict[str, Function] = {"triton": ops.swiglu, "torch": own, "compile": own}
    peer = liger("LigerSiLUMulFunction", "swiglu")
    if peer:
        providers["liger"] = lambda x: peer.apply(x[..., :width], x[..., width:])
    upstream = randn(rows, width)
    work = both("swiglu", {"T": rows, "F": width})
    return Case("swiglu", f"{rows}x{width}", work, "copy", leaves, providers, upstream, exact_of(own, leaves, upstream))


def gelu(rows: int, width: int) -> Case:
    leaves = [randn(rows, width), randn(width)]

    def own(x: Tensor, b: Tensor) -> Tensor:
        return F.gelu(x + b, approximate="tanh")

    providers: dict[str, Function] = {"triton": lambda x, b: ops.gelu(x, b), "torch": own, "compile": own}
    upstream = randn(rows, width)
    moved = rows * width * 2
    work = {"forward": (15 * rows * width, 2 * moved), "backward": (25 * rows * width, 3 * moved)}
    return Case(
        "gelu", f"{rows}x{width} +bias", work, "copy", leaves, providers, upstream, exact_of(own, leaves, upstream)
    )


def rope(tokens: int, heads: int, k_heads: int, head_dim: int) -> Case:
    batch, seq_length = 4, tokens // 4
    qkv = randn(batch, seq_length, heads + 2 * k_heads, head_dim)
    q, k = qkv[:, :, :heads].clone(), qkv[:, :, heads : heads + k_heads].clone()
    angles = torch.outer(torch.arange(seq_length, device=DEVICE).float(), torch.rand(head_dim // 2, device=DEVICE))
    cos, sin = angles.cos(), angles.sin()
    own = kernels.choose("cuda", {"rope": "reference"}).rope

    shape = {"T": tokens, "N": heads, "K": k_heads, "D": head_dim}
    fresh, fresh_q, fresh_k = qkv.clone(), q.clone(), k.clone()

    def prepare() -> None:  # some providers work in place
        qkv.copy_(fresh)
        q.copy_(fresh_q)
        k.copy_(fresh_k)

    providers: dict[str, Function] = {
        "triton": lambda: ops.rope(q, k, cos, sin),
        "triton in place": lambda: ops.rope_(qkv, heads, k_heads, cos, sin)[:2],
        "torch": lambda: own(q, k, cos, sin),
    }
    compiled = torch.compile(own)
    providers["compile"] = lambda: compiled(q, k, cos, sin)
    peer = liger("LigerRopeFunction", "rope")
    if peer:
        whole = torch.cat([cos, cos], -1)[None].to(BF16), torch.cat([sin, sin], -1)[None].to(BF16)

        def through_liger() -> tuple[Tensor, Tensor]:
            q_out, k_out = peer.apply(q.transpose(1, 2), k.transpose(1, 2), *whole)
            return q_out.transpose(1, 2), k_out.transpose(1, 2)

        providers["liger (bf16 tables)"] = through_liger
    return Case(
        "rope", f"{tokens} tokens {heads}+{k_heads}x{head_dim}", {"step": cost.cost("rope", shape, "bf16")}, "copy", [],
        providers, exact=lambda: list(own(fresh_q.float(), fresh_k.float(), cos, sin)), prepare=prepare,
    )  # fmt: skip


def refill(target: Tensor, source: Tensor) -> Callable[[], None]:
    def prepare() -> None:
        target.copy_(source)

    return prepare


def cross_entropy(rows: int, vocab: int) -> Case:
    fresh = randn(rows, vocab, scale=2.0)
    logits = fresh.clone()
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)

    def ours() -> list[Tensor]:
        return [triton_ce.forward_in_place(logits, labels, None, -100, 0.0, 0.0, vocab), logits]

    def own() -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        losses = F.cross_entropy(leaf, labels, reduction="none")
        return [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]

    def compiled(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), labels, reduction="none")

    providers: dict[str, Function] = {"triton in place": ours, "torch": own}
    compiled_loss = torch.compile(compiled)

    def through_compile() -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        losses = compiled_loss(leaf)
        return [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]

    providers["compile"] = through_compile
    peer = liger("LigerCrossEntropyFunction", "cross_entropy")
    if peer:

        def through_liger() -> list[Tensor]:
            leaf = logits.detach().requires_grad_()
            losses = peer.apply(leaf, labels, None, -100, 0.0, 0.0, "sum")
            losses = losses[0] if isinstance(losses, tuple) else losses
            losses.backward()
            return [losses.detach(), leaf.grad]

        providers["liger"] = through_liger

    def exact() -> list[Tensor | None]:
        leaf = fresh[:64].double().requires_grad_()
        losses = F.cross_entropy(leaf, labels[:64], reduction="none")
        return [None, torch.autograd.grad(losses.sum(), leaf)[0]]

    work = {"step": (9 * rows * vocab, 4 * rows * vocab)}
    return Case(
        "cross_entropy", f"{rows}x{vocab}", work, "copy", [], providers, exact=exact,
        view=lambda results: [results[0], results[1][:64]], prepare=refill(logits, fresh),
    )  # fmt: skip


def vocab_parallel(rows: int, vocab: int) -> Case:
    """One rank's share of the work: statistics of its columns, the merge of 8 ranks' numbers, the gradient in place."""
    fresh = randn(rows, vocab, scale=2.0)
    logits = fresh.clone()
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)
    ones = torch.ones((), device=DEVICE)

    def ours() -> list[Tensor]:
        part = triton_vp.local(logits, labels, 0, vocab, -100, False)
        gathered = part.new_zeros(8, *part.shape)
        gathered[:, 0] = float("-inf")
        gathered[0] = part
        losses, lse = triton_vp.merge(gathered, labels, vocab, -100, 0.0, 0.0)
        return [losses, triton_ce.gradient(ones, logits, labels, lse, -100, 0.0, 0.0, vocab, in_place=True)]

    def exact() -> list[Tensor | None]:
        losses = ce_reference.reference(fresh[:64].double(), labels[:64])
        return [losses, None]

    work = {"step": (9 * rows * vocab, 6 * rows * vocab)}
    return Case(
        "vocab_parallel", f"{rows}x{vocab}", work, "copy", [], {"triton": ours}, exact=exact,
        view=lambda results: [results[0][:64], results[1]], prepare=refill(logits, fresh),
    )  # fmt: skip


def linear_cross_entropy(rows: int, width: int, vocab: int) -> Case:
    leaves = [randn(rows, width), randn(vocab, width, scale=width**-0.5)]
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)
    chunked = kernels.choose("cuda", {"linear_cross_entropy": "chunked"}).linear_cross_entropy

    def own(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.T).float(), labels, reduction="sum")

    providers: dict[str, Function] = {
        "triton": lambda x, w: ops.linear_cross_entropy(x, w, labels),
        "chunked": lambda x, w: chunked(x, w, labels),
        "torch": own,
        "compile": own,
    }
    peer = liger("LigerFusedLinearCrossEntropyFunction", "fused_linear_cross_entropy")
    if peer:

        def through_liger(x: Tensor, w: Tensor) -> Tensor:
            loss = peer.apply(x, w, labels, None, None, -100, 0.0, 0.0, "sum")
            return loss[0] if isinstance(loss, tuple) else loss

        providers["liger"] = through_liger
    upstream = torch.tensor(1.0 / rows, device=DEVICE)

    def exact() -> list[Tensor | None]:
        """In fp32 by chunks: the logits of all rows at once would be twice 2 GB."""
        x, w = (t.float() for t in leaves)
        loss, dx, dw = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(w)
        for rows_here in torch.arange(rows, device="cpu").split(1024):
            part = slice(int(rows_here[0]), int(rows_here[-1]) + 1)
            logits = x[part] @ w.T
            losses = F.cross_entropy(logits, labels[part], reduction="sum")
            loss += losses
            logits = logits.softmax(-1)
            logits[torch.arange(len(logits), device=DEVICE), labels[part]] -= 1.0
            logits *= upstream
            dx[part] = logits @ w
            dw += logits.T @ x[part]
        return [loss, dx, dw]

    work = {"full": (6 * rows * width * vocab, 0)}
    size = f"M{rows} H{width} V{vocab}"
    return Case("linear_cross_entropy", size, work, "product", leaves, providers, upstream, exact)


def attention(batch: int, length: int, heads: int, k_heads: int, head_dim: int, documents: int = 0) -> Case:
    """Causal; with `documents` > 0 that many random documents in all, in whose squares the FLOPs are counted."""
    q, k, v = (randn(batch, length, n, head_dim) for n in (heads, k_heads, k_heads))
    cu_seqlens, segments = None, [length] * batch
    if documents:
        generator = torch.Generator().manual_seed(0)
        cuts = torch.randperm(batch * length - 1, generator=generator)[: documents - 1] + 1
        ends = sorted({0, batch * length, *cuts.tolist()})
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        every = sorted({*ends, *range(0, batch * length, length)})
        segments = [b - a for a, b in itertools.pairwise(every)]
    pairs = sum(n * (n + 1) // 2 for n in segments)
    forward = 4 * head_dim * heads * pairs
    moved = 2 * (q.numel() + k.numel()) * 2
    work = {"forward": (forward, moved), "backward": (forward * 5 // 2, 2 * moved)}
    upstream = randn(batch, length, heads, head_dim)
    providers: dict[str, Function] = {"triton": lambda q, k, v: ops.attention(q, k, v, cu_seqlens=cu_seqlens)}
    if documents:
        mask = attention_reference.visible(q, k, True, cu_seqlens, None)
        providers["sdpa mask"] = lambda q, k, v: _sdpa(q, k, v, mask)
        providers["flex"] = _flex(cu_seqlens, batch, length)
    else:
        from torch.nn.attention import SDPBackend

        for name, backend in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):
            providers[name] = lambda q, k, v, backend=backend: _through(backend, q, k, v)
    group = heads // k_heads

    def part(t: Tensor) -> Tensor:
        """One key head of the first sequence, or its queries: whole fp32 scores of all heads would be too large."""
        return t[:1, :, : group if t.shape[2] == heads else 1]

    def exact() -> list[Tensor | None]:
        wide = [part(t).detach().float().requires_grad_() for t in (q, k, v)]
        bounds = None
        if cu_seqlens is not None:
            bounds = torch.unique(cu_seqlens.clamp(max=length))
        out = attention_reference.reference(*wide, True, bounds)
        return [out.detach(), *torch.autograd.grad(out, wide, part(upstream).float())]

    size = f"B{batch} S{length} {heads}/{k_heads}x{head_dim}" + (f" {documents} documents" if documents else "")
    return Case(
        "attention", size, work, "product", [q, k, v], providers, upstream, exact,
        view=lambda results: [part(t) for t in results],
    )  # fmt: skip


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:  # the kernels of SDPA that take a mask take no grouped heads
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def _through(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return _sdpa(q, k, v, None)


def _flex(cu_seqlens: Tensor | None, batch: int, length: int) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert cu_seqlens is not None
    token = torch.arange(batch * length, device=DEVICE)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True).view(batch, length)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[b, i] == document[b, j])

    block_mask = create_block_mask(visible, batch, None, length, length, device=DEVICE)
    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

    return run


def adamw(count: int) -> Case:
    state = [randn(count, dtype=torch.float32) for _ in range(2)]
    state.append(state[1].square())
    param, grad = state[0].to(BF16), randn(count)
    scalars = {
        "lr": torch.tensor(1e-4, device=DEVICE),
        "step": torch.tensor(10.0, device=DEVICE),
        "grad_scale": torch.tensor(0.5, device=DEVICE),
    }
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    start = [t[:100_000].clone() for t in (param, *state, grad)]

    def step(name: str) -> Function:
        function = kernels.choose("cuda", {"adamw_": name}).adamw_

        def run() -> list[Tensor]:
            function(param, *state, grad, **scalars, **numbers)
            return state

        return run

    def exact() -> list[Tensor | None]:
        wide = [t.double() for t in start]
        kernels.choose("cuda", {"adamw_": "reference"}).adamw_(*wide, **scalars, **numbers)
        return list(wide[1:4])

    def prepare() -> None:
        for whole, part in zip((param, *state, grad), start, strict=True):
            whole[:100_000] = part

    return Case(
        "adamw_", f"{count / 1e6:.0f}M bf16 grad", {"step": (15 * count, 28 * count)}, "copy", [],
        {"triton": step("triton"), "torch fused": step("torch")}, exact=exact,
        view=lambda results: [t[:100_000] for t in results], prepare=prepare, tolerance=1e-5,
    )  # fmt: skip


def grad_norm(count: int) -> Case:
    grads = [randn(count // 2, dtype=torch.float32) for _ in range(2)]
    reference = kernels.choose("cuda", {"grad_norm": "reference"}).grad_norm
    return Case(
        "grad_norm", f"{count / 1e6:.0f}M fp32", {"step": (2 * count, 4 * count)}, "copy", [],
        {
            "triton": lambda: [ops.grad_norm(grads)],
            "reference": lambda: [reference(grads)],
            "torch foreach": lambda: [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))],
        },
        exact=lambda: [torch.stack([g.double().norm() for g in grads]).norm()], tolerance=1e-5,
    )  # fmt: skip


BUILDERS: dict[str, Callable[[Mapping[str, int]], Case]] = {
    "rms_norm": lambda z: rms_norm(z["T"], z["H"], fused="residual" in z),
    "layer_norm": lambda z: layer_norm(z["T"], z["H"]),
    "gelu": lambda z: gelu(z["T"], z["F"]),
    "swiglu": lambda z: swiglu(z["T"], z["F"]),
    "rope": lambda z: rope(z["T"], z["N"], z["K"], z["D"]),
    "cross_entropy": lambda z: cross_entropy(z["T"], z["V"]),
    "linear_cross_entropy": lambda z: linear_cross_entropy(z["T"], z["H"], z["V"]),
    "attention": lambda z: attention(z["B"], z["S"], z["N"], z["K"], z["D"], z["B"] * z.get("documents", 0)),
    "adamw_": lambda z: adamw(z["P"]),
    "grad_norm": lambda z: grad_norm(z["P"]),
}


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(op, builder) in order of importance, for a run may be cut off; the sizes are of `--set gpu`."""
    yield from map(_case, sets.GPU_QUICK)
    if quick:
        return
    yield "vocab_parallel", lambda: vocab_parallel(8192, 131072)
    yield from map(_case, sets.GPU[len(sets.GPU_QUICK) :])
    yield "vocab_parallel", lambda: vocab_parallel(8192, 32768)


def _case(entry: sets.Entry) -> tuple[str, Callable[[], Case]]:
    op = entry.op if entry.op in BUILDERS else entry.op.rstrip("_")  # cross_entropy is measured in place here
    return op, lambda: BUILDERS[op](entry.sizes)
