"""What every launch needs to know: the machine's width, and tensors seen as rows or as heads."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Of the machine assumed where there is none to ask (the interpreter, ahead-of-time compilation): an H100 or H200.
ASSUMED_MULTIPROCESSORS = 132


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; persistent kernels launch a small multiple of it."""
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def as_rows(x: Tensor) -> Tensor:
    """x [..., H] as [rows, H] with unit stride along H: a view wherever the strides allow one, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class Heads(NamedTuple):
    """A tensor [B, S, heads, D] as one argument of a kernel: where it begins, and its strides in elements.

    Triton takes the members of a tuple as it takes arguments: each has its own type, and is known to be 1, a multiple
    of 16 or aligned where it is.
    """

    start: Tensor
    batch: int
    token: int
    head: int


def as_heads(x: Tensor) -> Heads:
    """x [B, S, heads, D], the dims of a head adjacent, for a kernel."""
    batch, token, head, _ = x.stride()
    return Heads(x, batch, token, head)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
