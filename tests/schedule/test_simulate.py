"""The simulator against closed forms and against a simulator by events, written apart from it."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from play import parse, times

from megapre.schedule import BUILDERS, Costs, Schedule, ScheduleError, build, simulate
from megapre.schedule.formulas import SPLIT, bubble, in_flight

NAMES = st.sampled_from(list(BUILDERS))
SIZES = {"ranks": st.integers(1, 16), "chunks": st.integers(1, 4), "micro_batches": st.integers(1, 64)}


def built(name: str, ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """With the chunks it can have, and micro-batches enough for it."""
    builder = BUILDERS[name]
    chunks = max(builder.least, min(chunks, builder.most or chunks))
    return build(name, ranks, chunks, max(micro_batches, 2 * ranks) if name == "dualpipev" else micro_batches)


@settings(max_examples=100)
@given(name=NAMES, **SIZES)
def test_bubble_and_in_flight_equal_the_closed_forms(name: str, ranks: int, chunks: int, micro_batches: int) -> None:
    schedule = built(name, ranks, chunks, micro_batches)
    p, v, m = schedule.ranks, schedule.chunks, schedule.micro_batches
    timeline = simulate(schedule, Costs.of(schedule.stages))
    assert list(timeline.in_flight) == [in_flight(name, p, v, m, rank) for rank in range(p)]
    assert timeline.work == (3 * m * v,) * p
    expected = bubble(name, p, v, m)
    least = (p - 1) / (3 * v * m)
    if expected is None:
        assert timeline.bubble >= least - 1e-12
    else:
        assert timeline.makespan == 3 * m * v + (p - 1) * (1 if name in SPLIT else 3)
        assert timeline.bubble == pytest.approx(expected, abs=1e-12) and expected >= least - 1e-12


def test_closed_forms_are_the_published_ones() -> None:
    assert bubble("1f1b", 8, 1, 32) == bubble("gpipe", 8, 1, 32) == 7 / 32
    assert bubble("interleaved", 8, 4, 32) == bubble("breadth_first", 8, 4, 32) == 7 / (4 * 32)
    assert bubble("zb_h1", 8, 1, 32) == 7 / (3 * 32)
    assert bubble("zbv", 8, 2, 32) == bubble("dualpipev", 8, 2, 32) == 7 / (6 * 32)
    assert bubble("zbv", 8, 2, 14) is None
    for v, share in ((2, 11.5), (4, 9.75)):  # Narayanan et al. 2021: p (1 + (p-1)/(p v)) of p = 8
        assert in_flight("interleaved", 8, v, 64, rank=0) / v == share
    with pytest.raises(ScheduleError, match="no closed form for 'mine'"):
        in_flight("mine", 1, 1, 1, 0)


@settings(max_examples=40)
@given(chunks=st.integers(2, 4), ranks=st.integers(2, 8), micro_batches=st.integers(2, 40), data=st.data())
def test_larger_groups_keep_the_bubble_and_more_activations(
    chunks: int, ranks: int, micro_batches: int, data: st.DataObject
) -> None:
    m = max(micro_batches, ranks)
    sizes = [g for g in range(ranks, m + 1) if m % g == 0 or m % g >= ranks]
    g = data.draw(st.sampled_from(sizes))
    timeline = simulate(build("interleaved", ranks, chunks, m, group=g), Costs.of(ranks * chunks))
    assert timeline.makespan == 3 * (m * chunks + ranks - 1)
    assert list(timeline.in_flight) == [in_flight("interleaved", ranks, chunks, m, r, g) for r in range(ranks)]


@st.composite
def uneven(draw: st.DrawFn, most_ranks: int, most_micro_batches: int) -> tuple[Schedule, Costs]:
    """A schedule with costs that differ from stage to stage; quarters, so that sums are exact."""
    schedule = built(
        draw(NAMES),
        draw(st.integers(1, most_ranks)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, most_micro_batches)),
    )
    quarters = st.integers(0, 40).map(lambda n: n / 4)
    each = st.lists(quarters, min_size=schedule.stages, max_size=schedule.stages)
    costs = Costs.of(
        schedule.stages,
        forward=draw(each),
        input=draw(each),
        weights=draw(each),
        backward=draw(st.none() | each),
        message=draw(st.just(0.0) | each),
        latency=draw(st.just(0.0) | quarters),
        bandwidth=draw(st.sampled_from([0.5, 2.0, math.inf])),
    )
    return schedule, costs


@settings(max_examples=60)
@given(case=uneven(5, 12))
def test_equals_a_simulation_by_events(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    timeline, expected = simulate(schedule, costs), times(schedule, costs)
    for rank, program in enumerate(schedule):
        found = list(zip(timeline.starts[rank], timeline.ends[rank], strict=True))
        assert found == [expected[rank, at] for at in range(len(program))]
    assert timeline.makespan == max(end for _, end in expected.values())


@settings(max_examples=30)
@given(case=uneven(16, 64))
def test_bounds(case: tuple[Schedule, Costs]) -> None:
    """No rank runs two things at once, and nothing ends before the work of any rank or the way of one micro-batch
    through all stages and back.
    """
    schedule, costs = case
    timeline = simulate(schedule, costs)
    for rank in range(schedule.ranks):
        assert all(end <= start for end, start in zip(timeline.ends[rank], timeline.starts[rank][1:], strict=False))
        chunks = [schedule.stage_of(rank, chunk) for chunk in range(schedule.chunks)]
        work = sum(costs.times[kind][chunks[chunk]] for kind, chunk, _ in schedule[rank])
        assert timeline.work[rank] == work <= timeline.makespan
    back = [min(pair) for pair in zip(costs.backward, costs.input, strict=True)]
    hops = [
        costs.message[stage] / costs.bandwidth + costs.latency
        for stage, (a, b) in enumerate(pairwise(range(schedule.stages)))
        if schedule.holder(a)[0] != schedule.holder(b)[0]
    ]
    assert timeline.makespan >= sum(costs.forward) + sum(back) + 2 * sum(hops)


def test_links_take_messages_one_after_the_other() -> None:
    """F takes 1, the wire 2 for a message and 5 until it arrives: rank 1 gets one at 8, one at 10."""
    schedule = parse("F0.0 F1.0 B0.0 B1.0", "F0.0 F1.0 B0.0 B1.0")
    timeline = simulate(schedule, Costs.of(2, message=4, bandwidth=2, latency=5))
    assert list(timeline.starts[1]) == [8, 10, 11, 13]
    assert timeline.sent == (8, 8)


def test_bytes_that_ranks_keep() -> None:
    """What is kept is let go by B, or by I in part and by W in whole."""
    split = parse("F0.0 F1.0 I0.0 I1.0 W0.0 W1.0")
    whole = parse("F0.0 F1.0 B0.0 B1.0")
    for kept_for_weights, most in ((None, 20), (3, 20)):
        costs = Costs.of(1, kept=10, kept_for_weights=kept_for_weights)
        assert simulate(split, costs).kept == (most,) and simulate(whole, costs).kept == (20,)
    late = parse("F0.0 I0.0 F1.0 I1.0 W0.0 W1.0")
    assert simulate(late, Costs.of(1, kept=10, kept_for_weights=3)).kept == (13,)


def test_uneven_stages_show_in_bubble_and_idle() -> None:
    timeline = simulate(build("1f1b", 2, 1, 4), Costs.of(2, forward=[1, 3], input=[1, 3], weights=[1, 3]))
    assert timeline.work == (12, 36) and timeline.makespan == 36 + 1 + 2
    assert timeline.bubble == 3 / 36 and timeline.idle == 1 - 48 / (2 * 39)


def test_bad_costs_and_schedules_that_stop() -> None:
    with pytest.raises(ScheduleError, match="forward has 3 numbers for 2 stages; give one, or 2"):
        Costs.of(2, forward=[1, 2, 3])
    with pytest.raises(ScheduleError, match=r"weights = .* holds a number below 0"):
        Costs.of(1, weights=-1)
    with pytest.raises(ScheduleError, match="bandwidth = 0 above 0"):
        Costs.of(1, bandwidth=0)
    with pytest.raises(ScheduleError, match=r"costs of 3 stages for a schedule of 2 ranks \* 1 chunks = 2 stages"):
        simulate(build("1f1b", 2, 1, 2), Costs.of(3))
    with pytest.raises(ScheduleError, match=r"rank 0 waits for ever at action 1 \(B0.0\) for B0.0 of rank 1"):
        simulate(parse("F0.0 B0.0 F1.0 B1.0", "F0.0 F1.0 B0.0 B1.0"), Costs.of(2))
