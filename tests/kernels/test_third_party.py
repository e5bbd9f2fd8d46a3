"""Rows of other libraries, without them: stand-ins with the signatures of their public functions compute with torch.

They show that each row hands over what its library's own source asks for, in its order and shapes, and that what comes
back is what the op's reference gives. That the libraries compute it is for a machine with a GPU.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rule import run, twice
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels
from megapre.kernels import adamw, attention, grad_norm, layer_norm, rms_norm, rope, swiglu
from megapre.kernels.third_party import apex, flash_attention, found, liger, torch_sdpa, transformer_engine

Calls = list[dict[str, Any]]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts functions under a module's name, and empty packages above it."""

    def put(name: str, **functions: Any) -> None:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        for key, function in functions.items():
            monkeypatch.setattr(sys.modules[name], key, function, raising=False)

    return put


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


# Detection


def install(path: Path, modules: list[str], distribution: str = "", version: str = "") -> None:
    for module in modules:
        (path / f"{module}.py").write_text("raise RuntimeError('imported')\n")
    if distribution:
        info = path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("why_not", "modules", "distribution", "old", "new"),
    [
        (liger.why_not, ["liger_kernel"], "liger-kernel", "0.8.4", "0.8.5"),
        (flash_attention.why_not_2, ["flash_attn", "flash_attn_2_cuda"], "flash_attn", "2.6.3", "2.8.3"),
        (
            transformer_engine.why_not,
            ["transformer_engine", "transformer_engine_torch"],
            "transformer_engine",
            "1.13.0",
            "2.10.0+c1a2b3",
        ),
    ],
)
def test_a_library_is_found_by_its_files_and_never_imported(
    why_not: Callable[[str], str],
    modules: list[str],
    distribution: str,
    old: str,
    new: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "runs on CUDA alone" in why_not("cpu")
    monkeypatch.syspath_prepend(tmp_path)
    if importlib.util.find_spec(modules[0]) is None:
        assert f"is not installed: there is no module {modules[0]}" in why_not("cuda")
    install(tmp_path, modules)
    importlib.invalidate_caches()
    assert f"does not tell its version (no {distribution} package)" in why_not("cuda")
    for version, here in ((old, False), (new, True)):
        place = tmp_path / version
        place.mkdir()
        install(place, [], distribution, version)
        monkeypatch.syspath_prepend(place)
        importlib.invalidate_caches()
        assert why_not("cuda") == "" if here else f"{old} is too old; " in why_not("cuda")
    assert not set(modules) & sys.modules.keys()


def test_flash_attention_3_needs_its_module_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, ["flash_attn_interface"])
    importlib.invalidate_caches()
    assert flash_attention.why_not_3("cuda") == ""
    assert kernels.choose("cuda", {"attention": "flash_attention_3"}).names["attention"] == "flash_attention_3"
    assert kernels.choose("cuda").names["attention"] != "flash_attention_3", "what refuses calls is no default"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert "needs compute capability 9.0; this device has 8.6" in flash_attention.why_not_3("cuda")


def test_the_indexs_unrelated_apex_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    importlib.invalidate_caches()
    for row in kernels.table("cuda"):
        if row.implementation == "apex":
            assert not row.available and "the Python index's unrelated package" in row.why_not
    (tmp_path / "apex" / "normalization").mkdir()
    install(tmp_path, ["amp_C"])
    importlib.invalidate_caches()
    available = {row.op for row in kernels.table("cuda") if row.implementation == "apex" and row.available}
    assert available == {"adamw_", "grad_norm"}, "norms need fused_layer_norm_cuda too"
    assert found.why_not("cuda", "x", ("amp_C", "nothing_of_this_name")).endswith("no module nothing_of_this_name")


# Attention


def flash_stand_in(calls: Calls) -> dict[str, Any]:
    """FlashAttention's two functions, with the arguments that versions 2 and 3 have in common by keyword."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: Any, causal: bool, window_size: Any, deterministic: bool
    ) -> Tensor:
        calls.append({"window": window_size, "deterministic": deterministic})
        left, right = window_size
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            mask &= distance >= 0
        if left >= 0:
            mask &= distance <= left
        if right >= 0:
            mask &= -distance <= right
        group = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=softmax_scale)
        return o.transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, **settings: Any
    ) -> Tensor:
        assert q.dim() == 3 and cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        ends = cu_q.tolist()
        assert ends[0] == 0 and ends[-1] == len(q) and max(b - a for a, b in pairwise(ends)) <= most_q == most_k
        parts = [
            flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], **settings)[0] for a, b in pairwise(ends) if b > a
        ]
        return torch.cat(parts)

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cuts", [None, [0, 3, 10, 21, 32], [0, 16, 32]])
@pytest.mark.parametrize(
    ("module", "row"),
    [
        ("flash_attn_interface", flash_attention.flash_attention_3),
        ("flash_attn", flash_attention.flash_attention_2),
    ],
)
def test_flash_attention_gets_what_it_asks_for(
    module: str,
    row: Callable[..., Tensor],
    cuts: list[int] | None,
    window: int | None,
    causal: bool,
    stand_in: Callable[..., None],
) -> None:
    calls: Calls = []
    stand_in(module, **flash_stand_in(calls))
    q, k, v = (random(2, 16, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    twice(
        lambda q, k, v: row(q, k, v, causal, cu_seqlens, window, 0.3),
        lambda q, k, v: attention.sdpa(q, k, v, causal, cu_seqlens, window, 0.3),
        [q, k, v],
    )
    expected = (-1, -1) if window is None else (4, 0 if causal else 4)
    assert {call["window"] for call in calls} == {expected}
    assert {call["deterministic"] for call in calls} == {True}, "these tests ask torch for deterministic algorithms"


def test_a_cache_has_more_keys_than_queries(stand_in: Callable[..., None]) -> None:
    stand_in("flash_attn", **flash_stand_in([]))
    q, k = random(2, 3, 4, 8, dtype=torch.bfloat16), random(2, 9, 2, 8, dtype=torch.bfloat16)
    got, expected = (op(q, k, k) for op in (flash_attention.flash_attention_2, attention.reference))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert flash_attention.flash_attention_2(q[:, :0], k, k).shape == (2, 0, 4, 8)


@pytest.mark.parametrize(
    ("row", "given", "words"),
    [
        ("flash_attention_2", {"dtype": torch.float32}, "torch.float32 with head dim 8"),
        ("flash_attention_3", {"head_dim": 264}, "bfloat16 with head dim 264"),
        ("flash_attention_3", {"return_lse": True}, "head dim 8 and lse"),
        ("cudnn", {"dtype": torch.float32}, "this call is in torch.float32"),
        ("cudnn", {"head_dim": 136}, "head dim 136"),
        ("cudnn", {"head_dim": 12}, "head dim 12"),
        ("cudnn", {"window": 3}, "this call has a window"),
        ("cudnn", {"cu_seqlens": True, "return_lse": True}, "this call has cu_seqlens and lse"),
        ("cudnn", {"queries": 3}, "causal with 3 queries and 6 keys"),
        ("flash", {"cu_seqlens": True}, "this call has cu_seqlens"),
        ("flash", {"head_dim": 264}, "head dim 264"),
    ],
)
def test_a_call_that_a_row_does_not_take_is_refused_in_words(row: str, given: dict[str, Any], words: str) -> None:
    dtype, head_dim = given.pop("dtype", torch.bfloat16), given.pop("head_dim", 8)
    q = random(1, given.pop("queries", 6), 2, head_dim, dtype=dtype)
    k = random(1, 6, 2, head_dim, dtype=dtype)
    if given.get("cu_seqlens"):
        given["cu_seqlens"] = torch.tensor([0, 2, 6], dtype=torch.int32)
    module = torch_sdpa if row in ("cudnn", "flash") else flash_attention
    stand_ins = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if row in stand_ins:
        sys.modules.setdefault(stand_ins[row], ModuleType(stand_ins[row]))
    try:
        with pytest.raises(ValueError, match=f"attention: {row} takes .*; .*{words}.*; choose `"):
            getattr(module, row)(q, k, k, **given)
    finally:
        if row in stand_ins and not hasattr(sys.modules[stand_ins[row]], "__file__"):
            del sys.modules[stand_ins[row]]


def test_one_backend_is_asked_for_and_its_absence_is_told() -> None:
    """A CPU has no cuDNN: torch's own refusal comes out as an error of the op that names the shapes."""
    q = random(1, 4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"finds no cudnn kernel for q \(1, 4, 2, 8\).* choose `sdpa`"):
        torch_sdpa.cudnn(q, q, q)
    torch.testing.assert_close(torch_sdpa.flash(q, q, q), attention.reference(q, q, q), rtol=2e-2, atol=2e-2)


def test_which_kernel_serves_which_call(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for module, name in ((torch_sdpa, "cudnn"), (torch_sdpa.triton, "attention"), (torch_sdpa.triton, "sdpa")):
        label = {"attention": "triton"}.get(name, name)
        monkeypatch.setattr(module, name, lambda q, *rest, label=label: taken.append(label) or q)
    half, wide = random(1, 6, 2, 8, dtype=torch.bfloat16), random(1, 6, 2, 8)
    large = random(1, 6, 2, 256, dtype=torch.bfloat16)
    cuts = torch.tensor([0, 2, 6], dtype=torch.int32)
    for arguments, expected in (
        (((half, half, half), {}), "cudnn"),
        (((half, half, half), {"causal": False}), "cudnn"),
        (((half, half, half), {"cu_seqlens": cuts}), "triton"),
        (((half, half, half), {"window": 3}), "triton"),
        (((half, half, half), {"return_lse": True}), "triton"),
        (((half[:, :1], half, half), {}), "sdpa"),
        (((wide, wide, wide), {}), "sdpa"),
        (((large, large, large), {}), "sdpa"),
    ):
        taken.clear()
        torch_sdpa.cudnn_or_triton(*arguments[0], **arguments[1])
        assert taken == [expected], arguments[1]


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "cudnn_or_triton"), ((8, 0), "sdpa_or_triton")])
def test_the_default_is_what_was_measured_for_the_device(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr("megapre.kernels.library.has_native", lambda op, device: False)
    assert kernels.choose("cuda").names["attention"] == expected


# Norms and activations


def apex_norms(calls: Calls) -> dict[str, Any]:
    def fused_layer_norm_affine(
        input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float, memory_efficient: bool = False
    ) -> Tensor:
        calls.append({"shape": normalized_shape})
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    def fused_rms_norm_affine(
        input: Tensor, weight: Tensor, normalized_shape: Any, eps: float, memory_efficient: bool = False
    ) -> Tensor:
        calls.append({"shape": normalized_shape})
        return F.rms_norm(input, normalized_shape, weight, eps)

    return {"fused_layer_norm_affine": fused_layer_norm_affine, "fused_rms_norm_affine": fused_rms_norm_affine}


class EngineNorm(torch.nn.Module):
    """transformer_engine.pytorch.ops.LayerNorm and RMSNorm: modules of their own parameters."""

    def __init__(self, normalized_shape: int, *, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        for name in self.names:
            setattr(self, name, torch.nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype)))

    def forward(self, x: Tensor) -> Tensor:
        weight, *bias = self.parameters()  # as its fuser reads them
        if bias:
            return F.layer_norm(x, weight.shape, weight, bias[0], self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


def engine_ops() -> dict[str, Any]:
    gated = {"SwiGLU": swiglu.composed_torch, "GEGLU": swiglu.geglu_composed_torch}
    return {
        "LayerNorm": type("LayerNorm", (EngineNorm,), {"names": ("weight", "bias")}),
        "RMSNorm": type("RMSNorm", (EngineNorm,), {"names": ("weight",)}),
        **{
            name: type(name, (torch.nn.Module,), {"forward": lambda self, x, f=function: f(x)})
            for name, function in gated.items()
        },
    }


def liger_function(compute: Callable[..., Any], count: int) -> Any:
    """A class with the `apply` of an autograd function of `count` arguments."""

    def apply(*arguments: Any) -> Any:
        assert len(arguments) == count
        return compute(*arguments)

    return type("Function", (), {"apply": staticmethod(apply)})


@pytest.fixture
def libraries(stand_in: Callable[..., None]) -> Calls:
    calls: Calls = []
    stand_in("apex.normalization.fused_layer_norm", **apex_norms(calls))
    stand_in("transformer_engine.pytorch.ops", **engine_ops())

    def rms(x: Tensor, w: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        assert (offset, casting, in_place) == (0.0, "gemma", False)
        return F.rms_norm(x, w.shape, w, eps)

    stand_in("liger_kernel.ops.rms_norm", LigerRMSNormFunction=liger_function(rms, 6))
    stand_in(
        "liger_kernel.ops.fused_add_rms_norm",
        LigerFusedAddRMSNormFunction=liger_function(lambda x, r, w, *rest: (rms(x + r, w, *rest), x + r), 7),
    )
    stand_in(
        "liger_kernel.ops.layer_norm",
        LigerLayerNormFunction=liger_function(lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps), 4),
    )
    return calls


LIBRARIES = [apex, liger, transformer_engine]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [(3, 5), (0,), ()])
def test_norms(library: ModuleType, residual: bool, rows: tuple[int, ...], libraries: Calls) -> None:
    x, r, weight, bias = random(*rows, 12), random(*rows, 12, seed=1), random(12), random(12, seed=1)
    rest = (r,) if residual else ()

    def layer(op: Any) -> Any:
        return lambda x, w, b, *r: op(x, w, b, 1e-5, *r)

    twice(layer(library.layer_norm), layer(layer_norm.fused_torch), [x, weight, bias, *rest])
    got, expected = (f(x, weight, None, 1e-5, *rest) for f in (library.layer_norm, layer_norm.reference))
    torch.testing.assert_close(got, expected)
    twice(
        lambda x, w, *r: library.rms_norm(x, w, 1e-6, *r),
        lambda x, w, *r: rms_norm.fused_torch(x, w, 1e-6, *r),
        [x, weight, *rest],
    )
    assert all(call["shape"] == (12,) for call in libraries)


def test_norms_of_two_dtypes_are_refused(libraries: Calls) -> None:
    x, weight = random(3, 12, dtype=torch.bfloat16), random(12)
    for library in (apex, transformer_engine):
        for op in (library.layer_norm, library.rms_norm):
            with pytest.raises(ValueError, match=r"torch.bfloat16 and (weight )?torch.float32; choose `triton`"):
                op(x, weight)


def test_gated_activations_of_transformer_engine(libraries: Calls) -> None:
    x = random(3, 14)
    twice(transformer_engine.swiglu, swiglu.composed_torch, [x])
    twice(transformer_engine.geglu, swiglu.geglu_composed_torch, [x])
    assert transformer_engine.swiglu(x[:0]).shape == (0, 7)
    with pytest.raises(ValueError, match="an even last dim"):
        transformer_engine.swiglu(x[:, :3])


def test_liger_never_writes_into_what_it_was_given(stand_in: Callable[..., None]) -> None:
    """Its geglu and rope work in place: stand-ins that overwrite everything show that only copies reach them."""

    def geglu_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.gelu(a, approximate="tanh") * b
        a.fill_(torch.nan), b.fill_(torch.nan)
        return a, b, y

    def geglu_backward(a: Tensor, b: Tensor, dc: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            a_, b_ = (t.clone().requires_grad_() for t in (a, b))
            da, db = torch.autograd.grad(F.gelu(a_, approximate="tanh") * b_, (a_, b_), dc)
        return a.copy_(da), b.copy_(db)

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        assert q.shape[1] == 4 and k.shape[1] == 2, "[B, N, S, D]"
        for x in (q, k):
            a, b = x.chunk(2, dim=-1)
            c, s = (t[:, None, :, : x.shape[-1] // 2] for t in (cos, sin * sign))
            x.copy_(torch.cat((a * c - b * s, b * c + a * s), dim=-1))
        return q, k

    stand_in("liger_kernel.ops.geglu", geglu_forward=geglu_forward, geglu_backward=geglu_backward)
    stand_in(
        "liger_kernel.ops.rope",
        rope_forward=lambda q, k, cos, sin: (*turn(q, k, cos, sin, 1.0), cos, sin),
        rope_backward=lambda q, k, cos, sin: turn(q, k, cos, sin, -1.0),
    )
    for rows in (1, 3):  # the halves of one row are no copies by themselves
        x = random(rows, 14)
        twice(liger.geglu, swiglu.geglu_composed_torch, [x])
        leaf = x.clone().requires_grad_()
        y = liger.geglu(leaf)
        once, again = (torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, again) and torch.equal(leaf, x)

    q, k = random(2, 6, 4, 8), random(2, 6, 2, 8)
    angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    tables = angles.cos(), angles.sin()
    before = q.clone(), k.clone()
    for where in (
        {},
        {"positions": torch.arange(12).view(2, 6) % 5},
        {"cu_seqlens": torch.tensor([0, 4, 7, 12], dtype=torch.int32)},
    ):
        got, expected = (
            run(lambda q, k, op=op, where=where: op(q, k, *tables, **where), [q, k])
            for op in (liger.rope, rope.reference)
        )
        torch.testing.assert_close(got, expected)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    with pytest.raises(ValueError, match="liger takes pairs of halves"):
        liger.rope(q, k, *tables, interleaved=True)
    assert liger.rope(q[:, :0], k[:, :0], *tables)[0].shape == (2, 0, 4, 8)


# The optimizer


def amp_c(calls: Calls) -> dict[str, Any]:
    def multi_tensor_adam_capturable(
        chunk_size: int,
        noop_flag: Tensor,
        tensor_lists: list[list[Tensor]],
        lr: Tensor,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: Tensor,
        mode: int,
        bias_correction: int,
        weight_decay: float,
        inv_scale: Tensor,
    ) -> None:
        assert [t.shape for t in (noop_flag, lr, step, inv_scale)] == [(1,)] * 4
        assert [t.dtype for t in (noop_flag, lr, step, inv_scale)] == [
            torch.int32, torch.float32, torch.int32, torch.float32
        ]  # fmt: skip
        calls.append({"mode": mode, "bias_correction": bias_correction, "chunk": chunk_size})
        if noop_flag.item() == 1:
            return
        for g, p, m, v in zip(*tensor_lists, strict=True):
            assert g.dtype == p.dtype
            g.mul_(inv_scale)
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            c1, c2 = 1 - beta1 ** step.item(), 1 - beta2 ** step.item()
            p.sub_(lr * (m / c1 / ((v / c2).sqrt() + epsilon) + weight_decay * p))

    def multi_tensor_l2norm(
        chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
    ) -> tuple[Tensor, Tensor]:
        assert len({t.dtype for t in tensor_lists[0]}) == 1 and all(t.is_contiguous() for t in tensor_lists[0])
        flat = torch.cat([t.float().flatten() for t in tensor_lists[0]])
        return torch.linalg.vector_norm(flat).view(1), torch.empty(0)

    return {
        "multi_tensor_adam_capturable": multi_tensor_adam_capturable,
        "multi_tensor_l2norm": multi_tensor_l2norm,
    }


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_adamw_of_apex(
    narrow: torch.dtype, grad_dtype: torch.dtype, found_inf: float | None, stand_in: Callable[..., None]
) -> None:
    calls: Calls = []
    stand_in("amp_C", **amp_c(calls))
    results = []
    for op in (apex.adamw_, adamw.reference):
        master, grad = random(70), random(70, seed=1).to(grad_dtype)
        param = master if narrow == torch.float32 else master.to(narrow)
        moments = random(70, seed=2), random(70, seed=3).abs()
        op(
            param, master, *moments, grad, lr=torch.tensor(1e-2), step=torch.tensor(3.0), beta1=0.9, beta2=0.95,
            eps=1e-8, weight_decay=0.1, grad_scale=torch.tensor(0.25),
            found_inf=None if found_inf is None else torch.tensor(found_inf),
        )  # fmt: skip
        results.append((param, master, *moments))
    torch.testing.assert_close(results[0], results[1])
    assert calls == [{"mode": 1, "bias_correction": 1, "chunk": 65536}], "AdamW, with bias correction"


def test_grad_norm_of_apex(stand_in: Callable[..., None]) -> None:
    stand_in("amp_C", **amp_c([]))
    grads = [random(70), random(5, 6, dtype=torch.bfloat16).T, random(0), random(3, seed=4)]
    torch.testing.assert_close(apex.grad_norm(grads), grad_norm.reference(grads))
    torch.testing.assert_close(apex.grad_norm(grads[:1]), grad_norm.reference(grads[:1]))
    assert apex.grad_norm([]).item() == 0 == apex.grad_norm([random(0)]).item()
    assert apex.grad_norm([torch.tensor([1.0, torch.inf])]).isinf()


@pytest.fixture(autouse=True)
def nothing_real() -> Iterator[None]:
    """A library that is installed keeps its place: these tests are for machines without it."""
    real = [name for name in ("liger_kernel", "transformer_engine", "amp_C", "flash_attn") if found.there(name)]
    if real and any(getattr(sys.modules.get(name), "__file__", None) for name in real):
        pytest.skip(f"{real} are imported here")
    yield
