"""lr_at against closed forms written out anew, and against its stated properties."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre.config import Optim
from megapre.optim.schedules import lr_at

PEAK, FLOOR = 3e-4, 3e-5


def optim(schedule: str, warmup: int = 10, decay: int = 0) -> Optim:
    return Optim(lr=PEAK, min_lr=FLOOR, schedule=schedule, warmup_steps=warmup, decay_steps=decay)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_a_line_from_zero_that_reaches_the_peak_at_its_last_step(schedule: str) -> None:
    cfg = optim(schedule, decay=20)
    assert [lr_at(step, cfg, 100) for step in range(1, 11)] == pytest.approx([PEAK * s / 10 for s in range(1, 11)])


def test_cosine() -> None:
    cfg = optim("cosine")
    for step in range(10, 101):
        turn = math.pi * (step - 10) / 90
        assert lr_at(step, cfg, 100) == pytest.approx(FLOOR + (PEAK - FLOOR) * (1 + math.cos(turn)) / 2, rel=1e-12)
    assert lr_at(55, cfg, 100) == pytest.approx((PEAK + FLOOR) / 2)
    assert lr_at(100, cfg, 100) == FLOOR


def test_linear_with_its_own_decay_length_stays_at_the_floor_afterwards() -> None:
    cfg = optim("linear", decay=40)
    assert lr_at(30, cfg, 100) == pytest.approx((PEAK + FLOOR) / 2)
    assert [lr_at(step, cfg, 100) for step in (50, 51, 100)] == [FLOOR] * 3


def test_wsd_holds_the_peak_until_the_final_decay() -> None:
    cfg = optim("wsd", decay=20)
    assert {lr_at(step, cfg, 100) for step in range(10, 81)} == {PEAK}
    assert lr_at(90, cfg, 100) == pytest.approx((PEAK + FLOOR) / 2)
    assert lr_at(100, cfg, 100) == FLOOR


def test_constant_never_falls() -> None:
    assert {lr_at(step, optim("constant"), 100) for step in range(10, 200)} == {PEAK}


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        lr_at(0, optim("cosine"), 100)


@given(
    schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    steps=st.integers(1, 500),
    warmup=st.integers(0, 500),
    decay=st.integers(0, 500),
)
def test_rises_then_falls_within_bounds(schedule: str, steps: int, warmup: int, decay: int) -> None:
    cfg = optim(schedule, warmup, decay)
    rates = [lr_at(step, cfg, steps) for step in range(1, steps + 1)]
    top = min(warmup, steps)
    assert all(0 < rate <= PEAK for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:top]))
    after = rates[max(warmup, 1) - 1 :]
    assert all(a >= b >= FLOOR for a, b in pairwise(after))
