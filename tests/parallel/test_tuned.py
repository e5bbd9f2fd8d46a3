"""What a run takes from a communication profile: all of it on the machines measured, nothing elsewhere."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn

from megapre.config import Layout
from megapre.mesh import Mesh
from megapre.parallel import tuned as tuning
from megapre.parallel.comm import CommError, Options, Place
from megapre.parallel.tuned import Tuned, key, options_of, tuned
from megapre.plan.comm_profile import write

CPU = torch.device("cpu")
CHOSEN = {"bucket_elements": 1 << 20, "overlap_products": True, "options": {"tp": {"nccl": {"max_ctas": 8}}}}
TWO = Place(0, 2, 0, 2)


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # as on the ranks, whose key it is part of


def written(file: Path, **changes: Any) -> Path:
    write(file, {**key(CPU, TWO, Mesh(2, tp=2)), **changes}, chosen=CHOSEN)
    return file


def on_rank(file: str, layout: dict[str, Any]) -> tuple[Tuned, list[str]]:
    rank = dist.get_rank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        named = Layout(tp=2, comm_profile=file, **layout)
        found = tuned(named, Place(rank, 2, rank, 2), CPU)
    return found, [str(warning.message) for warning in caught]


def test_the_profile_of_these_ranks_fills_in_what_the_config_leaves_open(run_on: RunOn, tmp_path: Path) -> None:
    file = written(tmp_path / "p.json")
    for found, warned in run_on(2, on_rank, str(file), {}):
        assert warned == [] and found.state.startswith(f"used: {file} of ")
        assert (found.layout.bucket, found.layout.overlap_products) == (1 << 20, True)
        assert found.options == {"tp": Options(nccl={"max_ctas": 8})}


def test_what_the_config_says_goes_before_it(run_on: RunOn, tmp_path: Path) -> None:
    file = written(tmp_path / "p.json")
    for found, _ in run_on(2, on_rank, str(file), {"bucket": 777, "overlap_products": False}):
        assert (found.layout.bucket, found.layout.overlap_products) == (777, False)


def test_what_this_layout_cannot_use_is_not_taken(run_on: RunOn, tmp_path: Path) -> None:
    """The recipe that was tuned cut its sequences, this one does not: with the ring its config would be refused."""
    file = written(tmp_path / "p.json")
    for found, _ in run_on(2, on_rank, str(file), {"sequence_parallel": False}):
        assert (found.layout.bucket, found.layout.overlap_products) == (1 << 20, False)
        assert "bucket = 1048576" in found.state and "overlap_products" not in found.state


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hardware": "NVIDIA H100"}, "hardware was NVIDIA H100 and is "),
        ({"torch": "2.0"}, "torch was 2.0 and is "),
        ({"nodes": 4}, "nodes was 4 and is 1"),
        ({"dp": 8}, "dp was 8 and is 1"),
        ({"topology": "ring"}, "topology was ring and is "),
    ],
)
def test_of_another_key_nothing_is_taken_and_one_rank_warns(
    run_on: RunOn, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    file = written(tmp_path / "p.json", **changes)
    (first, warned), (second, silent) = run_on(2, on_rank, str(file), {})
    assert len(warned) == 1 and said in warned[0] and "layout.comm_profile is not used" in warned[0]
    assert silent == []
    for found in (first, second):
        assert found.state.startswith("ignored: ") and found.options == {}
        assert (found.layout.bucket, found.layout.overlap_products) == (0, False)


def test_a_rank_on_another_machine_stops_all_from_using_it(run_on: RunOn, tmp_path: Path) -> None:
    (first, warned), (second, _) = run_on(2, on_rank_elsewhere, str(written(tmp_path / "p.json")))
    assert first.layout.bucket == second.layout.bucket == 0
    assert len(warned) == 1 and "of rank 1 AMD 486" in warned[0]


def on_rank_elsewhere(file: str) -> tuple[Tuned, list[str]]:
    real = tuning.machine
    if dist.get_rank() == 1:
        tuning.machine = lambda device, here: {**real(device, here), "hardware": "AMD 486"}
    try:
        return on_rank(file, {})
    finally:
        tuning.machine = real


def test_no_profile_is_looked_for_unless_it_is_named() -> None:
    found = tuned(Layout(tp=2, bucket=5), TWO, CPU)
    assert found.layout.bucket == 5 and found.options == {} and found.state.startswith("none: ")


def test_options_that_there_are_not_are_told() -> None:
    assert options_of({"environment": {"NCCL_ALGO": "Ring"}}).environment == {"NCCL_ALGO": "Ring"}
    with pytest.raises(CommError, match="'speed'"):
        options_of({"speed": 1})


def test_the_key_of_a_cpu() -> None:
    found = key(CPU, Place(5, 8, 1, 4), Mesh(8, tp=2, pp=2))
    assert found["backend"] == "gloo" and found["torch"] == torch.__version__
    assert (found["nodes"], found["ranks_per_node"]) == (2, 4)
    assert (found["tp"], found["pp"], found["cp"], found["dp"]) == (2, 2, 1, 2)
