"""Schedules against their definitions and closed forms, and the checker against schedules made wrong on purpose."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megapre.schedule import BUILDERS, Action, Schedule, ScheduleError, build, check, peak_in_flight, stage_of

sizes = {"ranks": st.integers(1, 16), "micro_batches": st.integers(1, 64)}
small = {"ranks": st.integers(1, 5), "micro_batches": st.integers(1, 8)}


def text(program: tuple[Action, ...]) -> str:
    return " ".join(map(str, program))


def parse(*programs: str) -> Schedule:
    return tuple(
        tuple(Action(word[0], int(word.split(".")[1]), int(word[1:].split(".")[0])) for word in program.split())  # type: ignore[arg-type]
        for program in programs
    )


def makespan(schedule: Schedule, chunks: int) -> int:
    """End of the last action with F = 1, B = 2, no time on the wire: a plain reading of the dependencies."""
    ranks = len(schedule)
    stages = ranks * chunks
    end: dict[tuple[str, int, int], int] = {}
    position, clock = [0] * ranks, [0] * ranks
    while any(position[rank] < len(schedule[rank]) for rank in range(ranks)):
        moved = False
        for rank in range(ranks):
            while position[rank] < len(schedule[rank]):
                kind, chunk, i = schedule[rank][position[rank]]
                stage = stage_of(rank, chunk, ranks)
                needs = [("F", stage - 1, i)] if kind == "F" else [("F", stage, i), ("B", stage + 1, i)]
                needs = [need for need in needs if 0 <= need[1] < stages]
                if not all(need in end for need in needs):
                    break
                start = max([clock[rank], *(end[need] for need in needs)])
                clock[rank] = end[kind, stage, i] = start + (1 if kind == "F" else 2)
                position[rank] += 1
                moved = True
        assert moved, "deadlock"
    return max(clock)


def test_one_rank_is_gradient_accumulation() -> None:
    assert text(build("1f1b", 1, 1, 3)[0]) == "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0"


def test_1f1b_by_hand() -> None:
    assert [text(program) for program in build("1f1b", 3, 1, 4)] == [
        "F0.0 F1.0 F2.0 B0.0 F3.0 B1.0 B2.0 B3.0",
        "F0.0 F1.0 B0.0 F2.0 B1.0 F3.0 B2.0 B3.0",
        "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0 F3.0 B3.0",
    ]


def test_gpipe_by_hand() -> None:
    assert text(build("gpipe", 2, 1, 2)[1]) == "F0.0 F1.0 B0.0 B1.0"
    assert text(build("gpipe", 2, 2, 2)[0]) == "F0.0 F1.0 F0.1 F1.1 B0.1 B1.1 B0.0 B1.0"


@given(**sizes)
def test_bubble_and_in_flight_equal_the_closed_forms(ranks: int, micro_batches: int) -> None:
    p, m = ranks, micro_batches
    for name, in_flight in (("gpipe", [m] * p), ("1f1b", [min(p - r, m) for r in range(p)])):
        schedule = build(name, p, 1, m)
        assert check(schedule, 1, m) == []
        assert makespan(schedule, 1) == 3 * (m + p - 1)  # bubble (p-1)/m of the ideal 3m
        assert [peak_in_flight(program) for program in schedule] == in_flight


@given(**small, chunks=st.integers(1, 4))
def test_gpipe_with_chunks_runs(ranks: int, chunks: int, micro_batches: int) -> None:
    schedule = build("gpipe", ranks, chunks, micro_batches)
    assert check(schedule, chunks, micro_batches) == []
    assert peak_in_flight(schedule[0]) == micro_batches * chunks
    if micro_batches >= ranks:  # then no forward waits between chunks, and the bubble is (p-1)/(v m)
        assert makespan(schedule, chunks) == 3 * (micro_batches * chunks + ranks - 1)


@given(**small)
def test_gradients_add_up_in_one_order(ranks: int, micro_batches: int) -> None:
    for rank in range(ranks):
        orders = {
            tuple(action.micro_batch for action in build(name, ranks, 1, micro_batches)[rank] if action.kind == "B")
            for name in BUILDERS
        }
        assert orders == {tuple(range(micro_batches))}


def test_megatrons_interleaved_order_passes_the_check() -> None:
    assert (
        check(
            parse(
                "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0",
                "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0",
            ),
            2,
            4,
        )
        == []
    )


@given(data=st.data(), name=st.sampled_from(sorted(BUILDERS)), **small)
def test_a_missing_doubled_or_foreign_action_is_found(
    data: st.DataObject, name: str, ranks: int, micro_batches: int
) -> None:
    programs = [list(program) for program in build(name, ranks, 1, micro_batches)]
    rank = data.draw(st.integers(0, ranks - 1))
    place = data.draw(st.integers(0, 2 * micro_batches - 1))
    action = programs[rank][place]
    mutation = data.draw(st.sampled_from(["drop", "double", "foreign"]))
    if mutation == "drop":
        del programs[rank][place]
        expected = f"rank {rank}: {action} is missing"
    elif mutation == "double":
        programs[rank].insert(place, action)
        expected = f"rank {rank}: {action} comes 2 times"
    else:
        programs[rank].append(Action("F", 0, micro_batches))
        expected = f"rank {rank}: F{micro_batches}.0 is not of 1 chunks and {micro_batches} micro-batches"
    assert check(tuple(map(tuple, programs)), 1, micro_batches) == [expected]


@given(data=st.data(), name=st.sampled_from(sorted(BUILDERS)), **small)
def test_swapped_actions_are_judged_as_a_run_would(
    data: st.DataObject, name: str, ranks: int, micro_batches: int
) -> None:
    """Any two actions of one rank swapped: the checker objects exactly where a run with FIFO channels would stop."""
    programs = [list(program) for program in build(name, ranks, 1, micro_batches)]
    rank = data.draw(st.integers(0, ranks - 1))
    i, j = (data.draw(st.integers(0, 2 * micro_batches - 1)) for _ in range(2))
    assume(programs[rank][i] != programs[rank][j])
    programs[rank][i], programs[rank][j] = programs[rank][j], programs[rank][i]
    schedule = tuple(map(tuple, programs))
    assert bool(check(schedule, 1, micro_batches)) == (not runs_with_fifo_channels(schedule))


def runs_with_fifo_channels(schedule: Schedule) -> bool:
    """Play it (one chunk a rank) with queues; False on a wrong message, a missing forward, or no progress."""
    ranks = len(schedule)
    queues: dict[tuple[int, int], list[Action]] = {(a, b): [] for a in range(ranks) for b in (a - 1, a + 1)}
    position = [0] * ranks
    while any(position[rank] < len(schedule[rank]) for rank in range(ranks)):
        before = list(position)
        for rank, program in enumerate(schedule):
            if position[rank] == len(program):
                continue
            action = program[position[rank]]
            source = rank - 1 if action.kind == "F" else rank + 1
            if action.kind == "B" and action._replace(kind="F") not in program[: position[rank]]:
                return False
            if 0 <= source < ranks:
                if not queues[source, rank]:
                    continue
                if queues[source, rank].pop(0) != action:
                    return False
            target = rank + 1 if action.kind == "F" else rank - 1
            if 0 <= target < ranks:
                queues[rank, target].append(action)
            position[rank] += 1
        if before == position:
            return False
    return True


def test_deadlock_names_rank_action_and_peer() -> None:
    problems = check(parse("F0.0 B0.0 F1.0 B1.0", "F0.0 F1.0 B0.0 B1.0"), 1, 2)
    assert problems == [
        "rank 0 waits for ever at action 1 (B0.0) for B0.0 of rank 1",
        "rank 1 waits for ever at action 1 (F1.0) for F1.0 of rank 0",
    ]


def test_message_order_names_both_sides() -> None:
    problems = check(parse("F0.0 F1.0 B0.0 B1.0", "F1.0 F0.0 B0.0 B1.0"), 1, 2)
    assert problems == ["rank 0 to rank 1: message 0 is sent as F0.0 and received as F1.0"]


def test_backward_before_forward_on_one_rank() -> None:
    assert check(parse("B0.0 F0.0"), 1, 1) == ["rank 0 waits for ever at action 0 (B0.0) for F0.0 of rank 0"]
    assert check((), 1, 1) == ["no ranks"]


def test_what_cannot_be_built() -> None:
    with pytest.raises(ScheduleError, match=r"no schedule '1f1f'; did you mean '1f1b'\? there are gpipe, 1f1b"):
        build("1f1f", 2, 1, 4)
    with pytest.raises(ScheduleError, match="micro_batches = 0 must be at least 1"):
        build("1f1b", 2, 1, 0)
    with pytest.raises(ScheduleError, match="one chunk a rank, not 2"):
        build("1f1b", 2, 2, 4)


def test_a_large_schedule_is_built_and_checked() -> None:
    schedule = build("gpipe", 32, 4, 128)
    assert check(schedule, 4, 128) == []
