"""Rows of other libraries, without them: stand-ins with the signatures of their public functions compute with torch.

They show that each row hands over what its library's own source asks for, in its order and shapes, and that what comes
back is what the op's reference gives. That the libraries compute it is for a machine with a GPU.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rule import run, twice
from stand_ins import Calls, random
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels
from megapre.kernels import adamw, grad_norm, layer_norm, rms_norm, rope, swiglu
from megapre.kernels.third_party import apex, flash_attention, found, liger, transformer_engine

pytestmark = pytest.mark.usefixtures("nothing_real")


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
