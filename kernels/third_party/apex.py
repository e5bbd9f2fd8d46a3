"""NVIDIA Apex as rows of norms, AdamW and the gradient norm.

Apex is what has `amp_C` and `fused_layer_norm_cuda` beside it. The package of that name on the Python index is another
project; it is told apart by its missing `normalization` folder.

Norms go through apex.normalization. AdamW is amp_C's capturable form, which reads learning rate, step and overflow flag
from device memory; it updates fp32 master weights, and the parameter is a copy of them. As torch's fused kernel it
writes the scaled gradient back. Its offsets are 32-bit: a shard has fewer than 2^31 elements.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adamw import Update
from ..adamw import _check as check_adamw
from ..layer_norm import fused_torch as layer_norm_of_torch
from ..rms_norm import fused_torch as rms_norm_of_torch
from . import found

CHUNK = 2048 * 32
"""Elements that a block of threads takes, as everywhere in Apex."""


def why_not(*modules: str) -> Callable[[str], str]:
    """What stands in the way of a row that needs these of Apex's modules."""

    def reason(device: str) -> str:
        if device == "cuda" and _is_foreign():
            return (
                "NVIDIA Apex is not installed: the `apex` here is the Python index's unrelated package; build "
                "github.com/NVIDIA/apex with its CUDA extensions"
            )
        return found.why_not(device, "NVIDIA Apex with its CUDA extensions", modules)

    return reason


def _is_foreign() -> bool:
    spec = importlib.util.find_spec("apex") if found.there("apex") else None
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return spec is not None and not any((Path(place) / "normalization").is_dir() for place in places)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `layer_norm.reference`; the residual is added by torch. ValueError when x and weight differ in dtype."""
    _check_dtypes("layer_norm", x, weight)
    if x.numel() == 0:
        return layer_norm_of_torch(x, weight, bias, eps, residual)
    h = x if residual is None else x + residual
    bias = torch.zeros_like(weight) if bias is None else bias
    with torch.autocast(x.device.type, enabled=False):
        y = _norms().fused_layer_norm_affine(h, weight, bias, tuple(weight.shape), eps)
    return y if residual is None else (y, h)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `rms_norm.reference`; the residual is added by torch. ValueError when x and weight differ in dtype."""
    _check_dtypes("rms_norm", x, weight)
    if x.numel() == 0:
        return rms_norm_of_torch(x, weight, eps, residual)
    h = x if residual is None else x + residual
    with torch.autocast(x.device.type, enabled=False):
        y = _norms().fused_rms_norm_affine(h, weight, tuple(weight.shape), eps)
    return y if residual is None else (y, h)


def _norms() -> Any:
    return importlib.import_module("apex.normalization.fused_layer_norm")


def _check_dtypes(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype:
        raise ValueError(f"{op}: apex needs one dtype; x is {x.dtype} and weight {weight.dtype}; choose `triton`")


@torch.no_grad()
def adamw_(
    param: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    **update: Any,
) -> None:
    """As `adamw.reference`, for fp32 states of fewer than 2^31 elements. `grad` may be written."""
    check_adamw(param, master, exp_avg, exp_avg_sq, grad)
    if master.numel() >= 2**31:
        raise ValueError(f"adamw_: apex takes fewer than 2^31 elements, not {master.numel()}; choose `triton`")
    device = master.device
    lr, step, beta1, beta2, eps, weight_decay, grad_scale, found_inf = Update(**update)
    skip = torch.zeros(1, dtype=torch.int32, device=device) if found_inf is None else (found_inf != 0).int().view(1)
    scale = torch.ones(1, device=device) if grad_scale is None else grad_scale.float().view(1)
    adamw_mode, bias_correction = 1, 1
    if master.numel():
        importlib.import_module("amp_C").multi_tensor_adam_capturable(
            CHUNK, skip, [[grad.to(master.dtype)], [master], [exp_avg], [exp_avg_sq]], lr.view(1), beta1, beta2, eps,
            step.int().view(1), adamw_mode, bias_correction, weight_decay, scale,
        )  # fmt: skip
    if param is not master:
        param.copy_(master)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """As `grad_norm.reference`, with its limits. One launch for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        if grad.numel() >= 2**31:
            raise ValueError(f"grad_norm: apex takes fewer than 2^31 elements, not {grad.numel()}; choose `triton`")
        if grad.numel():
            by_dtype.setdefault(grad.dtype, []).append(grad.detach().contiguous())
    if not by_dtype:
        return torch.zeros((), dtype=torch.float32, device=grads[0].device if grads else "cpu")
    amp = importlib.import_module("amp_C")
    flag = torch.zeros(1, dtype=torch.int32, device=grads[0].device)  # set where the norm is not finite: not read
    norms = [amp.multi_tensor_l2norm(CHUNK, flag, [of], False)[0].view(()) for of in by_dtype.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
