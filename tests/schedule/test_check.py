"""The checker against schedules made wrong on purpose, and against a player that runs them."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from play import parse, runs

from megapre.schedule import BUILDERS, Action, Schedule, ScheduleError, build, check, checked, peak_in_flight

MUTATIONS = ("drop", "double", "swap", "move", "rename", "foreign")


@st.composite
def mutants(draw: st.DrawFn) -> Schedule:
    """A small schedule of any builder with one thing changed."""
    name = draw(st.sampled_from(list(BUILDERS)))
    ranks, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    chunks = 2 if name in ("interleaved", "zbv", "dualpipev") else draw(st.integers(1, 2))
    try:
        schedule = build(name, ranks, chunks, micro_batches)
    except ScheduleError:
        assume(False)
    programs = [list(program) for program in schedule]
    rank = draw(st.integers(0, ranks - 1))
    at, to = (draw(st.integers(0, len(programs[rank]) - 1)) for _ in range(2))
    match draw(st.sampled_from(MUTATIONS)):
        case "drop":
            del programs[rank][at]
        case "double":
            programs[rank].insert(to, programs[rank][at])
        case "swap":
            assume(at != to)
            programs[rank][at], programs[rank][to] = programs[rank][to], programs[rank][at]
        case "move":
            assume(ranks > 1)
            action = programs[rank].pop(at)
            other = (rank + draw(st.integers(1, ranks - 1))) % ranks
            programs[other].insert(min(to, len(programs[other])), action)
        case "rename":
            kind = draw(st.sampled_from([kind for kind in "FBIW" if kind != programs[rank][at].kind]))
            programs[rank][at] = programs[rank][at]._replace(kind=kind)  # type: ignore[arg-type]
        case "foreign":
            foreign = Action("F", chunks, 0) if draw(st.booleans()) else Action("B", 0, micro_batches)
            programs[rank].insert(at, foreign)
    return Schedule("mutant", chunks, micro_batches, tuple(map(tuple, programs)), schedule.placement)


@settings(max_examples=300)
@given(schedule=mutants())
def test_a_mutant_is_judged_as_a_run_judges_it(schedule: Schedule) -> None:
    """Dropped, doubled, swapped, moved to another rank, or made another kind: found, exactly where a run would stop or
    leave something undone.
    """
    assert bool(check(schedule)) == (not runs(schedule))


@settings(max_examples=60)
@given(schedule=mutants(), limit=st.integers(0, 2))
def test_a_limit_of_messages_only_adds_problems(schedule: Schedule, limit: int) -> None:
    assert set(check(schedule)) <= set(check(schedule, unreceived=limit)) or check(schedule, unreceived=limit)


def test_what_is_missing_doubled_or_foreign_is_named() -> None:
    whole = "F0.0 B0.0 F1.0 B1.0"
    for row, problems in {
        "F0.0 B0.0 F1.0": ["rank 0: B1.0 is missing"],
        "B0.0 F1.0 B1.0": ["rank 0: F0.0 is missing"],
        "F0.0 I0.0 F1.0 B1.0": ["rank 0: W0.0 is missing (I0.0 is there)"],
        "F0.0 W0.0 F1.0 B1.0": ["rank 0: I0.0 is missing (W0.0 is there)"],
        f"{whole} W0.0": ["rank 0: W0.0 comes beside B0.0, which contains it"],
        f"{whole} B1.0 B1.0": ["rank 0: B1.0 comes 3 times"],
        f"{whole} F0.1": ["rank 0: F0.1 is not of 1 chunks and 2 micro-batches"],
    }.items():
        assert check(Schedule("row", 1, 2, parse(row).programs)) == problems
    assert check(Schedule("none", 1, 1, ())) == ["no ranks"]


def test_deadlock_names_rank_action_and_peer() -> None:
    assert check(parse("F0.0 B0.0 F1.0 B1.0", "F0.0 F1.0 B0.0 B1.0")) == [
        "rank 0 waits for ever at action 1 (B0.0) for B0.0 of rank 1",
        "rank 1 waits for ever at action 1 (F1.0) for F1.0 of rank 0",
    ]


def test_weights_before_input_and_backward_before_forward() -> None:
    assert check(parse("F0.0 W0.0 I0.0")) == ["rank 0 waits for ever at action 1 (W0.0) for B0.0 of rank 0"]
    assert check(parse("B0.0 F0.0")) == ["rank 0 waits for ever at action 0 (B0.0) for F0.0 of rank 0"]


def test_message_order_names_both_sides() -> None:
    assert check(parse("F0.0 F1.0 B0.0 B1.0", "F1.0 F0.0 B0.0 B1.0")) == [
        "rank 0 to rank 1: activation 0 is sent as F0.0 and taken as F1.0"
    ]
    assert check(parse("F0.0 F1.0 B0.0 B1.0", "F0.0 F1.0 B1.0 B0.0")) == [
        "rank 1 to rank 0: gradient 0 is sent as B1.0 and taken as B0.0"
    ]


def test_a_gradient_may_overtake_an_activation() -> None:
    """On two ranks both go from rank 0 to rank 1, and not in the order in which rank 1 wants them."""
    schedule = build("interleaved", 2, 2, 4, group=4)
    assert check(schedule) == [] and runs(schedule)


@settings(max_examples=40)
@given(name=st.sampled_from(["gpipe", "1f1b", "zb_h1"]), ranks=st.integers(2, 6), micro_batches=st.integers(1, 12))
def test_a_message_under_way_is_enough_for_1f1b(name: str, ranks: int, micro_batches: int) -> None:
    """Under rendezvous, where a send waits for its receive, two neighbours of 1F1B send to each other and wait for
    ever. One message on its way is enough; GPipe needs none.
    """
    schedule = build(name, ranks, 1, micro_batches)
    assert check(schedule, unreceived=1) == []
    stuck = check(schedule, unreceived=0)
    assert bool(stuck) == (name != "gpipe" and micro_batches > 1)
    if stuck:
        assert any("to send it to rank" in line for line in stuck)


@settings(max_examples=40)
@given(
    name=st.sampled_from(["interleaved", "zb_h1", "zbv", "dualpipev"]),
    ranks=st.integers(1, 6),
    chunks=st.integers(2, 4),
    rounds=st.integers(2, 5),
)
def test_a_message_under_way_is_enough_for_chunks(name: str, ranks: int, chunks: int, rounds: int) -> None:
    """An executor needs one buffer a channel, unless groups are larger than the pipeline."""
    builder = BUILDERS[name]
    schedule = build(name, ranks, min(chunks, builder.most or chunks), rounds * ranks)
    assert check(schedule, unreceived=1) == []


def test_in_flight_bound_names_rank_and_action() -> None:
    schedule = build("1f1b", 4, 1, 8)
    assert [peak_in_flight(program) for program in schedule] == [4, 3, 2, 1]
    assert check(schedule, in_flight=4) == []
    assert check(schedule, in_flight=3) == ["rank 0 holds 4 activations after action 3 (F3.0), more than 3"]
    assert peak_in_flight(parse("F0.0 I0.0 F1.0 I1.0 W0.0 W1.0")[0]) == 2  # kept until W


def test_checked_says_all_in_one_error() -> None:
    good = build("gpipe", 2, 1, 2)
    assert checked(good) is good
    with pytest.raises(
        ScheduleError, match=r"schedule 'bad' cannot run:\n  - rank 0: F0.0 is missing\n(.*\n)*.*and 10 mo"
    ):
        checked(Schedule("bad", 1, 5, ((), ())))
