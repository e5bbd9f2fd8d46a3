"""The random bits: the published known answers, their order, and that rounding with them has no bias."""

import math

import pytest
import torch
from torch import Tensor

from megapre.kernels.philox import bits16, philox, round_stochastic

STEP = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123, the authors' library: philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    a, b, c, d = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox((a, b, c, d), key[0] | key[1] << 32)) == words


def test_bits_belong_to_the_number_of_an_element() -> None:
    whole = bits16(3, STEP, 1, 0, 700)
    for offset, count in ((0, 1), (5, 300), (127, 2), (128, 128), (640, 60)):
        assert torch.equal(bits16(3, STEP, 1, offset, count), whole[offset : offset + count])
    # Element 70 of group 0: second pair of words, counter (70 / 4) % 16 = 1, third quarter: the lower half of word 3.
    words = philox((torch.tensor([1]), torch.tensor([0]), torch.tensor([1]), torch.tensor([1])), 3)
    assert whole[70] == words[3] & 0xFFFF
    assert bits16(3, STEP, 1, 0, 0).shape == (0,)


def test_seed_step_and_stream_each_change_the_bits() -> None:
    draws = [bits16(3, STEP, 0, 0, 4096), bits16(4, STEP, 0, 0, 4096), bits16(3, STEP + 1, 0, 0, 4096)]
    draws += [bits16(3, STEP, 1, 0, 4096), bits16(3, STEP, 0, 4096, 4096), bits16(3 + 2**32, STEP, 0, 0, 4096)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            # Equal by chance: 4096 / 2^16 = 1/16 of an element expected; ten would have probability below 1e-18.
            assert (a == b).sum() < 10


def rounded_up(x: float, bits: Tensor) -> float:
    value = torch.full(bits.shape, x)
    rounded = round_stochastic(value, bits).float()
    assert set(rounded.tolist()) <= {lower(x), lower(x) + spacing(x)}
    return float((rounded != lower(x)).double().mean())


def spacing(x: float) -> float:
    return math.copysign(2.0 ** (math.floor(math.log2(abs(x))) - 7), x)


def lower(x: float) -> float:
    """The bf16 number next to x on the side of zero."""
    return math.trunc(x / spacing(x)) * spacing(x)


@pytest.mark.parametrize("x", [1.0 + 2**-9, -1.0 - 3 * 2**-10, 3.14159274, -1e-20, 1.0 + 2**-20, 257.0])
def test_rounding_has_no_bias(x: float) -> None:
    """n draws go up with probability p, the share cut off: the share seen is off by sqrt(p (1 - p) / n) on average.

    Five of these are exceeded by a right generator once in 1.7 million; the seed is fixed.
    """
    x = float(torch.tensor(x))
    n, p = 200_000, (x - lower(x)) / spacing(x)
    bound = 5 * math.sqrt(p * (1 - p) / n) + 2**-16  # and the bits have a resolution of 2^-16
    assert abs(rounded_up(x, bits16(7, STEP, 0, 0, n)) - p) < bound
    # The same for one element over many steps.
    over_steps = torch.cat([bits16(7, torch.tensor(step), 0, 12345, 1) for step in range(1, 1001)])
    assert abs(rounded_up(x, over_steps) - p) < 5 * math.sqrt(p * (1 - p) / 1000) + 2**-16


def test_bits_are_uniform_and_neighbours_independent() -> None:
    n = 2**18
    bits = bits16(11, STEP, 2, 0, n).double() / 2**16 - 0.5 + 2**-17
    # A uniform variable on (-1/2, 1/2) has variance 1/12; means and products of n of them scatter by 1/sqrt(n).
    assert abs(bits.mean()) < 5 * math.sqrt(1 / 12 / n)
    assert abs(bits.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    for lag in (1, 2, 4, 16, 64, 128, 4096):
        assert abs((bits[:-lag] * bits[lag:]).mean()) < 5 / 12 / math.sqrt(n - lag)
    for bit in range(16):
        share = (bits16(11, STEP, 2, 0, n) >> bit & 1).double().mean()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_numbers_that_bf16_holds_and_what_is_not_finite_stay() -> None:
    held = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-133, math.inf, -math.inf])
    for bits in (torch.zeros(7, dtype=torch.int64), torch.full((7,), 2**16 - 1)):
        assert torch.equal(round_stochastic(held, bits).float(), held)
    assert round_stochastic(torch.tensor([math.nan]), torch.tensor([2**16 - 1])).isnan().all()
