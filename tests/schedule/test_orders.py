"""Schedules against their definitions, Megatron-LM's tables and the generators of torch.distributed.pipelining."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from play import home, parse, runs, stage_at, text

from megapre.config.rules import CHUNKS
from megapre.schedule import BUILDERS, Action, Schedule, ScheduleError, build, check, holder, stage_of

small = {"ranks": st.integers(1, 6), "chunks": st.integers(1, 4), "micro_batches": st.integers(1, 16)}


def test_one_rank_is_gradient_accumulation() -> None:
    assert text(build("1f1b", 1, 1, 3)[0]) == "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0"


def test_1f1b_by_hand() -> None:
    assert [text(program) for program in build("1f1b", 3, 1, 4)] == [
        "F0.0 F1.0 F2.0 B0.0 F3.0 B1.0 B2.0 B3.0",
        "F0.0 F1.0 B0.0 F2.0 B1.0 F3.0 B2.0 B3.0",
        "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0 F3.0 B3.0",
    ]


def test_gpipe_and_breadth_first_by_hand() -> None:
    assert text(build("gpipe", 2, 1, 2)[1]) == "F0.0 F1.0 B0.0 B1.0"
    assert text(build("gpipe", 2, 2, 2)[0]) == "F0.0 F1.0 F0.1 F1.1 B0.1 B1.1 B0.0 B1.0"
    assert text(build("breadth_first", 2, 2, 2)[0]) == "F0.0 F1.0 F0.1 F1.1 B1.1 B0.1 B1.0 B0.0"


def test_zb_h1_by_hand() -> None:
    assert [text(program) for program in build("zb_h1", 2, 1, 3)] == [
        "F0.0 F1.0 I0.0 W0.0 F2.0 I1.0 W1.0 I2.0 W2.0",
        "F0.0 I0.0 F1.0 I1.0 W0.0 F2.0 I2.0 W1.0 W2.0",
    ]


MEGATRON = {  # (p, v, m, g): rank -> order of Megatron-LM's forward_backward_pipelining_with_interleaving
    (2, 2, 4, 2): {
        0: "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0",
        1: "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0",
    },
    (4, 2, 8, 4): {
        0: "F0.0 F1.0 F2.0 F3.0 F0.1 F1.1 F2.1 F3.1 F4.0 F5.0 F6.0 B0.1 F7.0 B1.1 F4.1 B2.1 F5.1 B3.1 F6.1 B0.0 "
        "F7.1 B1.0 B2.0 B3.0 B4.1 B5.1 B6.1 B7.1 B4.0 B5.0 B6.0 B7.0",
        3: "F0.0 F1.0 F2.0 F3.0 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 F4.0 B0.0 F5.0 B1.0 F6.0 B2.0 F7.0 B3.0 "
        "F4.1 B4.1 F5.1 B5.1 F6.1 B6.1 F7.1 B7.1 B4.0 B5.0 B6.0 B7.0",
    },
}


@pytest.mark.parametrize("sizes", MEGATRON, ids=str)
def test_interleaved_is_megatrons_order(sizes: tuple[int, int, int, int]) -> None:
    p, v, m, g = sizes
    for schedule in (build("interleaved", p, v, m), build("interleaved", p, v, m, group=g)):
        assert {rank: text(schedule[rank]) for rank in MEGATRON[sizes]} == MEGATRON[sizes]


def test_groups_of_interleaved() -> None:
    forwards = [a for a in build("interleaved", 2, 2, 5, group=3)[0] if a.kind == "F"]
    assert text(tuple(forwards)) == "F0.0 F1.0 F2.0 F0.1 F1.1 F2.1 F3.0 F4.0 F3.1 F4.1"  # 3, and a short group of 2
    assert build("interleaved", 4, 2, 10) == build("interleaved", 4, 2, 10, group=5)
    assert build("interleaved", 4, 2, 11) == build("interleaved", 4, 2, 11, group=6)
    assert build("interleaved", 4, 2, 3) == build("interleaved", 4, 2, 3, group=3)
    with pytest.raises(
        ScheduleError, match="4 ranks in groups of 5, 3 left over: each group, the last one too, needs 4 to 8"
    ):
        build("interleaved", 4, 2, 8, group=5)
    with pytest.raises(ScheduleError, match="nearest: group 4 or 8"):
        build("interleaved", 4, 2, 8, group=6)
    with pytest.raises(ScheduleError, match="groups of 0: "):
        build("interleaved", 4, 2, 8, group=0)
    with pytest.raises(ScheduleError, match="groups of 2, 1 left over: all 3 are one group, for they are no more"):
        build("interleaved", 4, 2, 3, group=2)


def torchs_order(name: str, ranks: int, chunks: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """What torch's generator makes, called without a process group."""
    torch = pytest.importorskip("torch.distributed.pipelining.schedules")
    kinds = {torch.F: "F", torch.FULL_BACKWARD: "B", torch.BACKWARD_INPUT: "I", torch.BACKWARD_WEIGHT: "W"}
    made: Any = object.__new__(getattr(torch, TORCHS[name]))
    rounds = max(1, micro_batches // ranks)
    made.__dict__.update(
        _n_microbatches=micro_batches,
        pp_group_size=ranks,
        _num_stages=ranks * chunks,
        num_stages=ranks * chunks,
        n_local_stages=chunks,
        _stages=[None] * chunks,
        number_of_rounds=rounds,
        microbatches_per_round=micro_batches // rounds,
    )
    single = hasattr(made, "_get_pipeline_order") and not hasattr(made, "_calculate_single_rank_operations")
    order = made._get_pipeline_order() if single else list(map(made._calculate_single_rank_operations, range(ranks)))
    programs = []
    for rank in range(ranks):
        flat = [part for action in order[rank] if action for part in (action.sub_actions or (action,))]
        flat = [part for part in flat if part.computation_type in kinds]
        places = [holder(part.stage_index, ranks, BUILDERS[name].placement) for part in flat]
        assert {place[0] for place in places} <= {rank}
        programs.append(
            tuple(
                Action(kinds[part.computation_type], chunk, part.microbatch_index)  # type: ignore[arg-type]
                for part, (_, chunk) in zip(flat, places, strict=True)
            )
        )
    return tuple(programs)


TORCHS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "breadth_first": "ScheduleLoopedBFS",
    "zb_h1": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


@pytest.mark.parametrize("name", BUILDERS)
def test_orders_equal_torchs_where_both_are_defined(name: str) -> None:
    compared = 0
    for p in range(1, 7):
        for v in range(1, 4):
            for m in range(1, 18):
                if name == "gpipe" and v > 1:
                    continue  # torch's has one chunk
                if name == "1f1b" and m < p:
                    continue  # torch's listing makes up micro-batches there
                if name in ("interleaved", "zb_h1") and m % max(1, m // p):
                    continue  # torch refuses these
                try:
                    schedule = build(name, p, v, m)
                except ScheduleError:
                    continue
                theirs = torchs_order(name, p, v, m)
                ranks = p - 1 if name == "1f1b" else p  # torch 2.13 lists its last rank from micro-batch 1 on
                assert schedule.programs[:ranks] == theirs[:ranks], (p, v, m)
                compared += 1
    assert compared > 60


@settings(max_examples=50)
@given(name=st.sampled_from(list(BUILDERS)), **small)
def test_what_is_built_runs_and_checks(name: str, ranks: int, chunks: int, micro_batches: int) -> None:
    try:
        schedule = build(name, ranks, chunks, micro_batches)
    except ScheduleError:
        return
    assert check(schedule) == []
    assert runs(schedule)


@settings(max_examples=50)
@given(name=st.sampled_from(list(BUILDERS)), **small)
def test_gradients_add_up_in_one_order(name: str, ranks: int, chunks: int, micro_batches: int) -> None:
    try:
        schedule = build(name, ranks, chunks, micro_batches)
    except ScheduleError:
        return
    for program in schedule:
        for chunk in range(chunks):
            order = [a.micro_batch for a in program if a.chunk == chunk and a.kind in "BW"]
            assert order == sorted(order, reverse=name == "breadth_first")


def test_the_config_knows_every_schedule_and_its_chunks() -> None:
    assert {name: (row.least, row.most or math.inf) for name, row in BUILDERS.items()} == CHUNKS


def test_placements() -> None:
    assert [[stage_of(r, c, 3) for c in range(2)] for r in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [[stage_of(r, c, 3, "v") for c in range(2)] for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    for placement in ("loop", "v"):
        schedule = Schedule("none", 3, 1, ((),) * 4, placement)  # type: ignore[arg-type]
        for stage in range(12):
            rank, chunk = schedule.holder(stage)
            assert rank == home(stage, 4, placement)
            assert schedule.stage_of(rank, chunk) == stage_at(schedule, rank, chunk) == stage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1f", 2, 1, 4), r"no schedule '1f1f'; did you mean '1f1b'\? there are gpipe, 1f1b, interleaved"),
        (("1f1b", 2, 1, 0), "micro_batches = 0 must be at least 1"),
        (
            ("1f1b", 2, 2, 4),
            r"one chunk a rank, not 2; nearest: chunks \(vpp\) 1, or for 2 chunks gpipe or inter",
        ),
        (("interleaved", 2, 1, 4), "two chunks or more a rank, not 1.*for 1 chunk gpipe or 1f1b"),
        (("zbv", 2, 3, 4), r"two chunks a rank, not 3; nearest: chunks \(vpp\) 2"),
        (("dualpipev", 4, 2, 7), r"2\*4 = 8, not 7; nearest: micro_batches 8, ranks \(pp\) 3, or zbv"),
        (("gpipe", 2, 2, 4, 2), "'gpipe' has no option 'group'; it has none"),
    ],
)
def test_what_cannot_be_built(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build(*arguments)


def test_unknown_options_are_named() -> None:
    with pytest.raises(ScheduleError, match="'interleaved' has no option 'size'; its options are group"):
        build("interleaved", 2, 2, 4, size=2)


def test_the_player_of_these_tests_stops_where_it_should() -> None:
    assert runs(parse("F0.0 B0.0", "F0.0 B0.0"))
    assert not runs(parse("F0.0 B0.0 F1.0 B1.0", "F0.0 F1.0 B0.0 B1.0"))
    assert not runs(parse("F0.0 F1.0 B0.0 B1.0", "F1.0 F0.0 B0.0 B1.0"))
    assert not runs(parse("F0.0 W0.0 I0.0"))
    assert runs(parse("F0.0 F0.1 B0.1 B0.0", "F0.0 F0.1 I0.1 I0.0 W0.0 W0.1", placement="v"))
