"""A product of 16-bit matrices added to an fp32 one as it is made, where torch can.

On CUDA `addmm` with an out_dtype does: one cuBLAS call whose fp32 sums begin with what is there, so that a gradient is
read and written once and never rounded. torch has that overload since 2.8, but lets its first argument be fp32 only
since about 2.9; every torch that megapre supports should do it. It is tried all the same, once for each device, because
the schema says nothing of dtypes: where it is refused, the product is made in fp32 and then added, which reads and
writes twice as much as a gradient and takes its memory for as long.
"""

import functools

import torch
from torch import Tensor


@functools.cache
def _adds_in_fp32(device: torch.device) -> bool:
    """Whether torch adds a product of 16-bit matrices to an fp32 one in place here: tried once."""
    try:
        total = torch.ones(16, 16, dtype=torch.float32, device=device)
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def write_product(total: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """total = a @ b, or total += a @ b where `accumulate`; total is fp32 or of the dtype of a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b) if accumulate else torch.mm(a, b, out=total)
    elif a.device.type != "cuda":  # without products of mixed dtypes: in the dtype of the sum
        product = a.to(total.dtype) @ b.to(total.dtype)
        total.add_(product) if accumulate else total.copy_(product)
    elif not accumulate:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif _adds_in_fp32(a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
