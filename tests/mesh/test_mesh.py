"""The grid of ranks against its definition: rank = ((pp * DP + dp) * CP + cp) * TP + tp."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre.errors import UserError
from megapre.mesh import AXES, Mesh, MeshError, spans

meshes = st.builds(
    lambda dp, tp, pp, cp: Mesh(dp * tp * pp * cp, tp=tp, pp=pp, cp=cp), *[st.integers(1, 4) for _ in range(4)]
)


@given(meshes)
def test_coords_follow_the_definition(mesh: Mesh) -> None:
    for rank in range(mesh.world):
        pp, dp, cp, tp = mesh.coords(rank)
        assert ((pp * mesh.dp + dp) * mesh.cp + cp) * mesh.tp + tp == rank
        assert mesh.grid[pp, dp, cp, tp] == rank


@given(meshes, st.lists(st.sampled_from(AXES), min_size=1, unique=True))
def test_groups_partition_the_world_and_vary_only_their_axes(mesh: Mesh, axes: list[str]) -> None:
    groups = mesh.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
    sizes = dict(zip(AXES, mesh.shape, strict=True))
    for group in groups:
        assert len(group) == math.prod(sizes[axis] for axis in axes)
        assert list(group) == sorted(group)
        fixed = {tuple(getattr(mesh.coords(rank), axis) for axis in AXES if axis not in axes) for rank in group}
        assert len(fixed) == 1
        for rank in group:
            assert mesh.group_of(rank, *axes) == group


def test_tensor_groups_are_neighbours_and_pipeline_groups_far() -> None:
    mesh = Mesh(16, tp=2, pp=4)
    assert mesh.groups("tp")[:3] == [(0, 1), (2, 3), (4, 5)]
    assert mesh.groups("pp")[0] == (0, 4, 8, 12)
    assert mesh.groups("dp")[0] == (0, 2)
    assert mesh.groups("cp")[5] == (5,)
    assert Mesh(16, tp=2, pp=2, cp=2).groups("dp", "cp")[0] == (0, 2, 4, 6)


def test_sixteen_thousand_ranks() -> None:
    mesh = Mesh(16384, tp=8, pp=16, cp=2)
    assert mesh.dp == 64
    assert mesh.group_of(16383, "pp")[0] == 1023
    assert len(mesh.groups("tp")) == 2048
    assert max(map(len, str(mesh).splitlines())) <= 100


def test_a_mesh_is_a_value() -> None:
    mesh = Mesh(8, tp=2)
    assert mesh == Mesh(8, tp=2)
    assert hash(mesh) == hash(Mesh(8, tp=2))
    with pytest.raises(AttributeError):
        mesh.tp = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        mesh.grid[0, 0, 0, 0] = 7


def test_picture() -> None:
    assert str(Mesh(8, tp=2, pp=2)) == (
        "8 ranks = pp 2 x dp 2 x cp 1 x tp 2\n       dp 0   dp 1\npp 0   0 1    2 3\npp 1   4 5    6 7"
    )
    assert str(Mesh(16, tp=2, cp=2, pp=2)).splitlines()[2] == "pp 0   0 1 | 2 3     4 5 | 6 7"
    assert str(Mesh(1)) == "1 rank"


@given(meshes)
def test_pictures_fit_a_terminal(mesh: Mesh) -> None:
    lines = str(mesh).splitlines()
    assert max(map(len, lines)) <= 100
    assert mesh.world == 1 or lines[-1].split()[:2] == ["pp", str(mesh.pp - 1)]


def test_what_cannot_be() -> None:
    with pytest.raises(MeshError, match=r"10 % 4 = 2\); nearest: world 8 or 12"):
        Mesh(10, tp=2, pp=2)
    with pytest.raises(MeshError, match=r"nearest: world 8$"):
        Mesh(3, tp=8)
    with pytest.raises(MeshError, match="tp = 0 must be at least 1"):
        Mesh(8, tp=0)
    with pytest.raises(MeshError, match=r"rank 8 is not in a world of 8 \(0 to 7\)"):
        Mesh(8).coords(8)
    with pytest.raises(MeshError, match="rank -1"):
        Mesh(8).group_of(-1, "tp")
    for axes in ((), ("ep",), ("tp", "tp")):
        with pytest.raises(MeshError, match="distinct ones of pp, dp, cp, tp"):
            Mesh(8).groups(*axes)
    assert issubclass(MeshError, UserError)


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 1, 2, 7, 9, 10], "ranks 0-2, 7, 9-10")]
)
def test_ranks_in_words(ranks: list[int], text: str) -> None:
    assert spans(ranks) == text
