"""Process groups: which there are, that all ranks make them in one order, and that each of them carries data."""

import dataclasses
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import RankError, RunOn

from megapre.mesh import Mesh
from megapre.parallel import comm
from megapre.parallel.comm import CommError, Group, Groups, Options, Place, Spec, blaming_others, connect, order, place

CPU = torch.device("cpu")
meshes = st.builds(
    lambda dp, tp, pp, cp: Mesh(dp * tp * pp * cp, tp=tp, pp=pp, cp=cp), *[st.integers(1, n) for n in (3, 3, 6, 2)]
)


@given(meshes, st.booleans(), st.booleans(), st.booleans())
def test_no_order_of_arrival_is_stuck(mesh: Mesh, embedding: bool, wrap: bool, kv: bool) -> None:
    """Each rank makes its groups one after the other, and a group is made when all of its ranks are there."""
    todo: defaultdict[int, list[Spec]] = defaultdict(list)
    for spec in order(mesh, embedding, wrap, mesh.tp if kv else 1):
        for rank in spec.ranks:
            todo[rank].append(spec)
    rounds = 0
    while any(todo.values()):
        rounds += 1
        here = Counter(specs[0] for specs in todo.values() if specs)
        made = {spec for spec, count in here.items() if count == len(spec.ranks)}
        assert made, "every rank waits for another one"
        for specs in todo.values():
            if specs and specs[0] in made:
                specs.pop(0)
    assert rounds <= len(comm.AXES) - 1 + 6  # channels: three matchings, two directions


@given(meshes, st.booleans(), st.booleans())
def test_all_groups_of_the_mesh_are_made_once(mesh: Mesh, embedding: bool, wrap: bool) -> None:
    specs = list(order(mesh, embedding, wrap))
    assert len(set(specs)) == len(specs) and all(len(spec.ranks) > 1 for spec in specs)
    by_axis = defaultdict(list)
    for axis, ranks in specs:
        by_axis[axis].append(ranks)
    for axis in ("tp", "cp", "dp", "pp"):
        assert by_axis[axis] == [ranks for ranks in mesh.groups(axis) if len(ranks) > 1]
    if mesh.cp > 1:
        assert by_axis["dp_cp"] == mesh.groups("dp", "cp")
    lines = mesh.groups("pp")
    assert by_axis["embedding"] == [(line[0], line[-1]) for line in lines if embedding and mesh.pp > 1]
    neighbours = {(a, b) for line in lines for a, b in itertools.pairwise(line)}
    if wrap and mesh.pp > 1:
        neighbours |= {(line[-1], line[0]) for line in lines}
    assert set(by_axis["send"]) == neighbours | {(b, a) for a, b in neighbours}


def test_sixteen_thousand_ranks() -> None:
    mesh = Mesh(16384, tp=8, pp=16, cp=2)
    counts = Counter(rank for spec in order(mesh, embedding=True, wrap=True) for rank in spec.ranks)
    assert set(counts.values()) == {9, 10}  # 5 axes and 4 channels; the ends of a pipeline one more


def sums(mesh: Mesh, **choices: Any) -> dict[str, Any]:
    """What a sum of ranks over each group gives, what arrives through each channel, and the groups themselves."""
    groups = connect(mesh, dist.get_rank(), CPU, **choices)
    found: dict[str, Any] = {}
    for name in ("world", "tp", "kv", "cp", "dp", "dp_cp", "pp", "embedding"):
        group = getattr(groups, name)
        if group is None:
            continue
        assert group.ranks[group.index] == groups.rank and (group.handle is None) == (group.size == 1)
        total = torch.tensor(groups.rank)
        if group.handle is not None:
            dist.all_reduce(total, group=group.handle)
        found[name] = group.ranks, total.item()
    # Sends in both directions at once, and receives after them: no channel stands in another one's way.
    sent = [dist.isend(torch.tensor(groups.rank), group=g.handle, group_dst=1 - g.index) for g in groups.send.values()]
    arrived = {}
    for peer, group in groups.receive.items():
        value = torch.tensor(-1)
        dist.recv(value, group=group.handle, group_src=1 - group.index)
        arrived[peer] = value.item()
    for work in sent:
        assert work is not None
        work.wait()
    found["arrived"] = arrived
    return found


@pytest.mark.parametrize(
    ("mesh", "wrap"),
    [
        (Mesh(8, tp=2, pp=2), True),
        (Mesh(8, tp=2, pp=2, cp=2), False),
        (Mesh(8, pp=4), True),
        (Mesh(5, pp=5), True),
        (Mesh(3, pp=3), False),
        (Mesh(2, tp=2), False),
    ],
)
def test_every_group_carries_data_between_its_ranks(run_on: RunOn, mesh: Mesh, wrap: bool) -> None:
    for rank, found in enumerate(run_on(mesh.world, functools.partial(sums, mesh, embedding=True, wrap=wrap))):
        at = mesh.coords(rank)
        assert found["world"][0] == tuple(range(mesh.world))
        for name, axes in (("tp", ["tp"]), ("cp", ["cp"]), ("dp", ["dp"]), ("dp_cp", ["dp", "cp"]), ("pp", ["pp"])):
            assert found[name][0] == mesh.group_of(rank, *axes)
        line = mesh.group_of(rank, "pp")
        assert ("embedding" in found) == (mesh.pp > 1 and at.pp in (0, mesh.pp - 1))
        arrived = found.pop("arrived")
        assert all(total == sum(ranks) for ranks, total in found.values())
        steps = {at.pp - 1, at.pp + 1}
        around = {step % mesh.pp for step in steps} if wrap else steps & set(range(mesh.pp))
        peers = {line[step] for step in around} - {rank}
        assert arrived == {peer: peer for peer in peers}


def test_ranks_with_the_same_key_value_heads_have_a_group(run_on: RunOn) -> None:
    found = run_on(8, functools.partial(sums, Mesh(8, tp=4), kv=2))
    assert [rank["kv"] for rank in found] == [((r, r + 1), 2 * r + 1) for r in (0, 0, 2, 2, 4, 4, 6, 6)]
    assert all(rank["kv"] == ((r,), r) for r, rank in enumerate(run_on(2, functools.partial(sums, Mesh(2, tp=2)))))


def test_one_rank_needs_no_process_group() -> None:
    groups = connect(Mesh(1), 0, CPU, embedding=True, wrap=True)
    assert not dist.is_initialized()
    assert groups == Groups(Mesh(1), 0, CPU, *[Group((0,), 0)] * 7, embedding=None, send={}, receive={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        groups.rank = 1  # type: ignore[misc]
    comm.join(Place(), CPU)
    comm.leave()
    assert not dist.is_initialized()


def test_a_mesh_of_another_size_is_refused(run_on: RunOn) -> None:
    with pytest.raises(CommError, match=r"layout: needs 4 ranks, 1 running:\n4 ranks = pp 2 x dp 1 x cp 1 x tp 2"):
        connect(Mesh(4, tp=2, pp=2), 0, CPU)
    with pytest.raises(RankError, match="CommError: layout: needs 4 ranks, 2 running:\n4 ranks"):
        run_on(2, sums, Mesh(4))


def stays_away() -> str:
    mesh = Mesh(2, tp=2)
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(CommError) as caught:
        connect(mesh, 0, CPU, options={"tp": Options(timeout=1)})
    return str(caught.value)


def test_a_group_that_is_not_made_in_time_is_named(run_on: RunOn) -> None:
    assert run_on(2, stays_away)[0].startswith("rank 0: the tp group of ranks 0, 1 failed: ")


def test_options_are_for_axes_that_there_are() -> None:
    with pytest.raises(CommError, match=r"options for ep; there are kv, tp, cp, dp, dp_cp, pp, embedding, send"):
        connect(Mesh(1), 0, CPU, options={"ep": Options()})


class Config:
    """The shape of torch's NCCLConfig, which builds for the CPU alone do not have."""

    def __init__(self) -> None:
        self.blocking = self.cga_cluster_size = self.min_ctas = self.max_ctas = 0

    def unsafe_get_ptr(self) -> int:
        return 0


@pytest.fixture
def with_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(is_high_priority_stream: bool) -> SimpleNamespace:
        return SimpleNamespace(is_high_priority_stream=is_high_priority_stream, config=Config())

    if not hasattr(dist, "ProcessGroupNCCL"):
        monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=made), raising=False)


def test_nccl_options_are_those_asked_for(with_nccl: None) -> None:
    made = comm.nccl_options(Options(high_priority=True, nccl={"min_ctas": 4, "max_ctas": 16}))
    assert made.is_high_priority_stream and (made.config.min_ctas, made.config.max_ctas) == (4, 16)
    assert not comm.nccl_options(Options()).is_high_priority_stream
    with pytest.raises(CommError, match=r"no option 'ctas'; there are .*max_ctas"):
        comm.nccl_options(Options(nccl={"ctas": 4}))


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_the_place_is_what_the_launcher_says() -> None:
    assert place({"HOME": "/", "MASTER_ADDR": "left over"}) == Place(0, 1, 0, 1)
    assert place(TORCHRUN | MASTER) == Place(5, 8, 1, 4)
    assert place({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}) == Place()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("LOCAL_RANK"), "RANK, WORLD_SIZE, LOCAL_WORLD_SIZE are set, but not LOCAL_RANK: start"),
        (lambda e: e.pop("MASTER_PORT"), "but not MASTER_PORT"),
        (lambda e: e.update(RANK="eight"), "not whole numbers: RANK = eight, WORLD_SIZE = 8"),
        (lambda e: e.update(RANK="8"), "no rank stands there: RANK = 8, WORLD_SIZE = 8"),
        (lambda e: e.update(LOCAL_RANK="4"), "no rank stands there"),
    ],
)
def test_a_contradictory_launcher_is_told(change: Callable[[dict[str, str]], object], message: str) -> None:
    environment = TORCHRUN | MASTER
    change(environment)
    with pytest.raises(CommError, match=message):
        place(environment)


@pytest.mark.parametrize(("said", "slow"), [("Timed out waiting 6000ms", True), ("Connection closed by peer", False)])
def test_who_waits_in_vain_is_told_how_to_wait_longer(said: str, slow: bool) -> None:
    with pytest.raises(CommError) as told, blaming_others(3):
        raise RuntimeError(f"[gloo/unbound_buffer.cc:78] {said}. This may be, and so on\nC++ stack")
    assert "rank 3: an operation with other ranks failed" in str(told.value) and said in str(told.value)
    assert ("a longer comm.timeout" in str(told.value)) == slow
