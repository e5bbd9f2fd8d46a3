"""layer_norm and rms_norm."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .case import EPS, Case, Function, Sizes, liger_function, randn, take, twice


def _norm(op: str, sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = take(sizes, "T", "H", residual=0)
    rows, width, fused = sizes["T"], sizes["H"], "residual" in sizes
    with_bias = op == "layer_norm"
    leaves = [randn((rows, width), dtype, device)] + [randn((width,), dtype, device) for _ in range(1 + with_bias)]
    leaves += [randn((rows, width), dtype, device)] * fused
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
    if (liger := liger_function(device, op, name)) and not fused:
        extra = (EPS,) if with_bias else (EPS, 0.0, "llama", False)
        peers["liger"] = lambda *leaves: liger.apply(*leaves, *extra)
    upstream = [randn((rows, width), dtype, device) for _ in range(1 + fused)]
    work = twice(op, sizes, dtype)
    return Case(
        op, sizes, dtype, device, "copy", work, adapt, lambda wrap: wrap(own), leaves, upstream, peers
    )  # fmt: skip


def layer_norm(sizes: Sizes, dtype: str, device: str) -> Case:
    return _norm("layer_norm", sizes, dtype, device)


def rms_norm(sizes: Sizes, dtype: str, device: str) -> Case:
    return _norm("rms_norm", sizes, dtype, device)
