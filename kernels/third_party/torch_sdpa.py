"""One kernel of torch's scaled_dot_product_attention at a time, as rows of `attention`: cuDNN's and FlashAttention's.

The row `sdpa` lets torch choose, which falls to slower kernels where a faster one cannot take the call; these do not.
A call that theirs cannot take is an error that says why.

cuDNN plans a graph for every new shape, in 0.5 to 1 s: shapes must not change from step to step. Its deterministic
backward needs memory of the size of the scores. On an H200 it took 0.52 to 0.65 of FlashAttention's time forward and
0.60 to 0.75 backward, of causal bf16 calls with heads of 64 and 128 (kernels_nvidia-h200_2026-11-20 in
benchmarks/results), hence `cudnn_or_triton`, which is the default from sm_90 on. These were torch's
functions by themselves: the rows have not yet run on a GPU.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import check, sdpa
from ..triton import ops as triton
from . import found

TAKES_CUDNN = "fp16 and bf16, head dims of a multiple of 8 up to 128, dense or causal with Sq = Sk; no lse"
TAKES_FLASH = "fp16 and bf16, head dims to 256, dense or causal with Sq = Sk; no lse"
LEAST_CUDNN = 90000
BEFORE_OTHERS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
LARGEST_HEAD = {"cudnn": 128, "flash": 256}  # by name: torch.compile cannot guard a dict with its enum for keys


def why_not_cudnn(device: str) -> str:
    if device != "cuda":
        return "cuDNN runs on CUDA alone"
    if torch.cuda.is_available() and (torch.backends.cudnn.version() or 0) < LEAST_CUDNN:
        return f"cuDNN 9 is needed; torch has {torch.backends.cudnn.version() or 'none'}"
    return found.needs_capability((8, 0), "cuDNN's attention")


def why_not_flash(device: str) -> str:
    if device != "cuda":
        return "FlashAttention runs on CUDA alone"
    return found.needs_capability((8, 0), "FlashAttention")


def why_not_cudnn_or_triton(device: str) -> str:
    """Not there below sm_90, where nobody has measured which of the two dense kernels is faster."""
    if missing := why_not_cudnn(device) or triton.why_not(device):
        return missing
    old = found.needs_capability((9, 0), "it")
    return old and f"{old}: below, cuDNN has not been measured against `sdpa_or_triton`; choose that, or `cudnn`"


def cudnn(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor:
    """As `attention.reference`. ValueError for what TAKES_CUDNN leaves out."""
    check(q_BSND, k_BSKD, v_BSKD, cu_seqlens, window)
    if why := _refused(q_BSND, k_BSKD, causal, cu_seqlens, window, return_lse, "cudnn"):
        raise ValueError(f"attention: cudnn takes {TAKES_CUDNN}; {why}; choose `cudnn_or_triton`, `triton` or `sdpa`")
    return _by("cudnn", SDPBackend.CUDNN_ATTENTION, q_BSND, k_BSKD, v_BSKD, causal, scale)


def flash(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor:
    """As `attention.reference`. ValueError for what TAKES_FLASH leaves out."""
    check(q_BSND, k_BSKD, v_BSKD, cu_seqlens, window)
    if why := _refused(q_BSND, k_BSKD, causal, cu_seqlens, window, return_lse, "flash"):
        raise ValueError(f"attention: flash takes {TAKES_FLASH}; {why}; choose `sdpa_or_triton`, `triton` or `sdpa`")
    return _by("flash", SDPBackend.FLASH_ATTENTION, q_BSND, k_BSKD, v_BSKD, causal, scale)


def cudnn_or_triton(
    q_BSND: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cudnn` for the calls that it takes, else `sdpa_or_triton`: Triton for documents, windows and lse, else SDPA.

    torch has reasons of its own to refuse cuDNN, deterministic algorithms among them: then its next best serves.
    """
    refused = _refused(q_BSND, k_BSKD, causal, cu_seqlens, window, return_lse, "cudnn")
    if refused or q_BSND.numel() == 0:
        return triton.attention_by_mask(q_BSND, k_BSKD, v_BSKD, causal, cu_seqlens, window, scale, return_lse)
    check(q_BSND, k_BSKD, v_BSKD, cu_seqlens, window)
    with sdpa_kernel(BEFORE_OTHERS, set_priority=True):
        return sdpa(q_BSND, k_BSKD, v_BSKD, causal, None, None, scale)


def _refused(
    q: Tensor,
    k: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    return_lse: bool,
    name: str,
) -> str:
    """Why a kernel does not take the call; empty where it does."""
    head_dim, most = q.shape[-1], LARGEST_HEAD[name]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"this call is in {q.dtype}"
    if cu_seqlens is not None or window is not None or return_lse:
        asked = {"cu_seqlens": cu_seqlens is not None, "a window": window is not None, "lse": return_lse}
        return f"this call has {' and '.join(name for name, is_asked in asked.items() if is_asked)}"
    if head_dim > most or head_dim % 8:
        return f"this call has head dim {head_dim}"
    if causal and q.shape[1] != k.shape[1]:
        return f"this call is causal with {q.shape[1]} queries and {k.shape[1]} keys"
    return ""


def _by(name: str, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    if q.numel() == 0:
        return torch.zeros_like(q)
    try:
        with sdpa_kernel(backend):
            o = sdpa(q, k, v, causal, None, None, scale)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
            raise
        shapes = f"q {tuple(q.shape)} and k {tuple(k.shape)} in {q.dtype}"
        raise ValueError(
            f"attention: torch {torch.__version__} finds no {name} kernel for {shapes}; choose `sdpa`"
        ) from error
    assert isinstance(o, Tensor)
    return o
