"""The collectives that are timed: on real ranks their check passes, and it sees what is wrong."""

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn

from megapre.mesh import Mesh
from megapre.parallel import collectives
from megapre.parallel.collectives import Call, pattern, rounded
from megapre.parallel.comm import CommError, Groups, Options, connect, remake
from megapre.parallel.stopwatch import Stopwatch, calls_for, sample
from megapre.plan.link import FACTORS

CPU = torch.device("cpu")


def groups_of(**sizes: int) -> Groups:
    return connect(Mesh(dist.get_world_size(), **sizes), dist.get_rank(), CPU)


def all_checks(pp: int, tp: int) -> dict[tuple[str, str, int], str]:
    groups = groups_of(pp=pp, tp=tp)
    found = {}
    for axis in collectives.AXES:
        group = collectives.group_of(groups, axis)
        for name in FACTORS if group.size > 1 else ():
            for size in (rounded(4, group.size), rounded(1000, group.size), rounded(2**18, group.size)):
                call = Call(name, groups, axis, size)
                first = call.check()
                for _ in range(3):
                    call()
                found[axis, name, size] = first or call.check()
    return found


@pytest.mark.parametrize(("ranks", "pp", "tp"), [(2, 1, 1), (4, 2, 2), (3, 3, 1), (4, 1, 2)])
def test_what_arrives_is_right_on_every_axis(run_on: RunOn, ranks: int, pp: int, tp: int) -> None:
    for found in run_on(ranks, all_checks, pp, tp):
        assert set(found.values()) == {""}
        axes = {axis for axis, _, _ in found}
        assert "world" in axes and axes >= ({"pp"} if pp > 1 else set()) | ({"tp"} if tp > 1 else set())


def check_with(broken: str) -> list[str]:
    """What the checks say where rank 1 does something else after each collective, or all do nothing."""
    groups = groups_of()
    said = []
    for name in FACTORS:
        call = Call(name, groups, "world", 1 << 10)
        run = call.run
        call.run = _break(call, run, broken)
        said.append(call.check())
    return said


def _break(call: Call, run: Callable[[], object], broken: str) -> Callable[[], None]:
    def otherwise() -> None:
        if broken == "silent":
            return
        run()
        if dist.get_rank() == 1:
            call.arrived[7] += 1 if broken == "one" else 0
            if broken == "shifted":
                call.arrived.copy_(call.arrived.roll(1))

    return otherwise


def test_what_is_wrong_is_seen(run_on: RunOn) -> None:
    for broken in ("one", "shifted"):
        right, wrong = run_on(2, check_with, broken)
        assert right == [""] * len(FACTORS)
        assert all("numbers are wrong on rank 1" in text for text in wrong)
    assert all("numbers are wrong" in text for text in run_on(2, check_with, "silent")[1][:5])


@pytest.mark.parametrize("n", [1, 5, 126, 127, 128, 300])
def test_the_total_is_the_sum_of_all_patterns(n: int) -> None:
    whole = sum(pattern(rank, 3, 500, CPU).double() for rank in range(n))
    assert torch.equal(collectives._total(n, 3, 500, CPU).double(), whole)


def test_sizes_are_rounded_up_to_equal_parts() -> None:
    assert [rounded(size, 3) for size in (1, 12, 13, 24)] == [12, 12, 24, 24]


def lap() -> tuple[float, float]:
    world = groups_of().world
    watch = Stopwatch(world, CPU)
    seconds = watch(lambda: time.sleep(0.02 * (1 + dist.get_rank())), 2)
    return seconds, watch.most(float(dist.get_rank()))


def test_the_slowest_rank_counts_on_all(run_on: RunOn) -> None:
    times = run_on(3, lap)
    assert len({seconds for seconds, _ in times}) == 1 and times[0][0] >= 0.06
    assert {number for _, number in times} == {2.0}


def test_a_sample_takes_as_many_calls_as_last_and_as_many_times_as_it_can_afford() -> None:
    asked: list[int] = []

    def once(calls: int) -> float:
        asked.append(calls)
        return 1e-4

    assert calls_for(once, 2e-3) in (20, 21)
    assert [len(times) for times in sample([once, once], 25, budget=1.0)] == [25, 25]
    assert [len(times) for times in sample([once, once], 25, budget=0.0)] == [5, 5]
    assert asked[-1] in (20, 21)


def test_calls_take_turns() -> None:
    said: list[str] = []

    def once(name: str, calls: int) -> float:
        said.append(name)
        return 1.0

    sample([partial(once, "a"), partial(once, "b")], 6, budget=0.0)
    assert "".join(said) == "aabb" + "ab" * 5


def again() -> tuple[int, float, str]:
    groups = groups_of(tp=2)
    group = remake(groups.mesh, "dp", groups.rank, CPU, Options(timeout=30.0))
    token = torch.ones(1)
    dist.all_reduce(token, group=group.handle)
    try:
        remake(groups.mesh, "pp", groups.rank, CPU, Options())
    except CommError as error:
        return group.size, token.item(), str(error)
    return group.size, token.item(), ""


def test_the_groups_of_an_axis_are_made_again_with_other_options(run_on: RunOn) -> None:
    for size, total, error in run_on(4, again):
        assert (size, total) == (2, 2.0) and "the pp axis has no groups of several ranks" in error
