"""Rotary tables against the formulas of the papers, in fp64."""

import math

import pytest
import torch

from megapre.config import Model, RopeScaling
from megapre.model.rope import Rotary, frequencies


def test_unscaled():
    got = frequencies(64, 10000.0, None)
    want = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_linear_divides():
    got = frequencies(32, 5e5, RopeScaling(type="linear", factor=4.0))
    torch.testing.assert_close(got, frequencies(32, 5e5, None) / 4)


def test_llama3_keeps_fast_divides_slow_blends_between():
    scaling = RopeScaling(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    base = frequencies(128, 5e5, None)
    got = frequencies(128, 5e5, scaling)
    seen = set()
    for f, g in zip(base.double().tolist(), got.tolist(), strict=True):
        turns = 8192 * f / (2 * math.pi)
        if turns > 4:
            want, kind = f, "fast"
        elif turns < 1:
            want, kind = f / 8, "slow"
        else:
            t = (turns - 1) / (4 - 1)
            want, kind = (1 - t) * f / 8 + t * f, "between"
        seen.add(kind)
        assert g == pytest.approx(want, rel=1e-6)
    assert seen == {"fast", "slow", "between"}


def test_tables_cover_the_context():
    cfg = Model(family="llama", layers=1, hidden=64, heads=2, ffn=8, context=50, vocab=10, rope_theta=100.0)
    rotary = Rotary(cfg, "cpu")
    assert rotary.cos.shape == rotary.sin.shape == (50, 16) and rotary.cos.dtype == torch.float32
    angle = 49 * 100.0 ** (-2 * 3 / 32)
    assert rotary.cos[49, 3].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert rotary.sin[49, 3].item() == pytest.approx(math.sin(angle), abs=1e-5)
