"""Random bits from a counter: Philox4x32-10, in plain torch, the definition that csrc/cpu/philox.h repeats.

Salmon, Moraes, Dror and Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". There is no state: an element's bits
follow from seed, step, stream and the element's number, whoever computes them and in whatever order.

Elements are numbered in groups of 128. With l = e % 128, element number e has 16 bits of

    word = philox(counter = {16 (e / 128) + l / 4 % 16 (64 bits), step (32), stream (32)}, key = seed (64))

namely those of word[2 (l / 64) + l % 4 / 2], its lower half if l is even and else its upper.
"""

import torch
from torch import Tensor

GROUP = 128
_LOW = 0xFFFFFFFF


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a * b for numbers below 2^32; int64 wraps, which leaves the 64 bits as they are."""
    product = a * b
    return product >> 32 & _LOW, product & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each counter; words are int64 in [0, 2^32), `seed` counts modulo 2^64."""
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(x0, 0xD2511F53), _product(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return x0, x1, x2, x3


def bits16(seed: int, step: Tensor, stream: int, offset: int, count: int) -> Tensor:
    """16 random bits, as int64 in [0, 2^16), for elements number `offset` to `offset` + `count` - 1.

    `step` is a 0-dim tensor; the result is on its device.
    """
    first, last = offset // GROUP, -(-(offset + count) // GROUP)
    counters = torch.arange(16 * first, 16 * last, device=step.device)
    step_word = (step.to(torch.int64) & _LOW).expand_as(counters)
    counter = (counters & _LOW, counters >> 32, step_word, torch.full_like(counters, stream))
    x0, x1, x2, x3 = philox(counter, seed)
    halves = torch.stack([word >> shift & 0xFFFF for word in (x0, x1, x2, x3) for shift in (0, 16)], 1)
    # [group, counter, pair of words, quarter] -> the order of the elements
    bits = halves.view(-1, 16, 2, 4).transpose(1, 2).reshape(-1)
    return bits[offset - GROUP * first :][:count]


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 `x` in bf16, up or down at random: up with the share of the spacing that is cut off, so the mean is x.

    `bits`: one number in [0, 2^16) an element. inf and NaN stay.
    """
    kept = (x.view(torch.int32).to(torch.int64) + bits) >> 16  # the sign is the top bit: what is added grows |x|
    signed = torch.where(kept >= 2**15, kept - 2**16, kept)
    return torch.where(x.isfinite(), signed.to(torch.int16).view(torch.bfloat16), x.to(torch.bfloat16))
