"""Measured links for the planner: exact where measured, on a ring's line between, silent elsewhere."""

from pathlib import Path

import pytest

from megapre.plan import Link
from megapre.plan.comm_profile import write
from megapre.plan.link import fit
from megapre.plan.measured import Measured, of_axis

HERE = {"hardware": "H100", "tp": 2, "pp": 1, "cp": 1, "dp": 8}
ALPHA, BETA = 3e-6, 1e-9


def ring(collective: str, size: float, ranks: int) -> float:
    """Steps of a ring, each of latency ALPHA and 1 / ranks of the bytes (Thakur et al. 2005, section 3)."""
    steps = (ranks - 1) * (2 if collective == "all_reduce" else 1)
    return steps * (ALPHA + size / ranks * BETA)


def measured(collective: str, ranks: int) -> Link:
    return fit(collective, ranks, {2**n: ring(collective, 2**n, ranks) for n in range(10, 21)})


def test_times_between_sizes_are_on_the_line_through_them() -> None:
    link = Link(1.0, 2.0, times={100: 5.0, 200: 6.0, 400: 20.0})
    assert [link.interpolated("send_recv", size, 2) for size in (100, 150, 200, 300, 400)] == [5, 5.5, 6, 13, 20]
    assert link.interpolated("send_recv", 3, 2) == 5, "below the smallest"
    assert link.interpolated("all_gather", 500, 4) == 20 + 100 * 0.75 / 2, "beyond the largest at the fit's bandwidth"
    assert Link(1.0, 2.0).interpolated("send_recv", 10, 2) == 6, "of an older profile, the fit alone"


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
def test_a_ring_of_a_size_between_those_measured_is_told_exactly(collective: str) -> None:
    found = Measured({collective: {ranks: measured(collective, ranks) for ranks in (2, 16)}})
    for ranks in (2, 3, 8, 15, 16):
        for size in (2**10, 3000, 2**20):
            assert found.seconds(collective, size, ranks) == pytest.approx(ring(collective, size, ranks), rel=1e-9)
    assert found.seconds(collective, 2**10, 1) == 0


def test_of_several_profiles_that_of_this_layout_counts_and_then_the_newest(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    for latency, layout in ((1, HERE), (2, {**HERE, "pp": 4}), (3, {**HERE, "pp": 2})):
        write(file, layout, {"dp": {"all_reduce": Link(latency, 1.0)}})
    write(file, {**HERE, "tp": 4}, {"dp": {"all_reduce": Link(9, 1.0)}})  # its replicas are further apart
    write(file, {**HERE, "hardware": "A100"}, {"dp": {"all_reduce": Link(9, 1.0)}})
    for pp, latency in ((1, 1), (8, 3), (4, 2)):
        found, source = of_axis(file, {**HERE, "pp": pp}, "dp", ["all_reduce"])
        assert found is not None and found.seconds("all_reduce", 0, 8) == latency
        assert source.startswith(f"measured among 8 ranks ({file} of 20")


def test_what_was_not_measured_is_said_in_numbers(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    assert (
        of_axis(file, HERE, "dp", ["all_reduce"])[1]
        == f"there is no {file}; `megapre bench comm --write-profile` makes one"
    )
    write(file, {**HERE, "dp": 2}, {"dp": {"all_reduce": Link(1, 1.0)}, "tp": {"all_gather": Link(1, 1.0)}})
    write(file, {**HERE, "dp": 4}, {"dp": {"all_reduce": Link(1, 1.0)}})
    found, why = of_axis(file, HERE, "dp", ["all_reduce"])
    assert found is None and f"{file} has no all_reduce of dp 8 on H100, tp 2, cp 1 (there are those of 2, 4); " in why
    found, why = of_axis(file, HERE, "tp", ["all_gather", "reduce_scatter"])
    assert found is None and "has no all_gather and reduce_scatter of tp 2 on H100; `megapre bench comm" in why
    found, source = of_axis(file, {**HERE, "dp": 3}, "dp", ["all_reduce"])
    assert found is not None and source.startswith("interpolated between those measured among 2 and 4 ranks")
