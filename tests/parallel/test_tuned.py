"""What a run takes from a communication profile: all of it on the machines measured, nothing elsewhere."""

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


def written(file: Path, **changes: Any) -> Path:
    write(file, {**key(CPU, TWO, Mesh(2, tp=2)), **changes}, chosen=CHOSEN)
    return file


def on_rank(file: str, layout: dict[str, Any]) -> Tuned:
    rank = dist.get_rank()
    return tuned(Layout(tp=2, comm_profile=file, **layout), Place(rank, 2, rank, 2), CPU)


def test_the_profile_of_these_ranks_fills_in_what_the_config_leaves_open(run_on: RunOn, tmp_path: Path) -> None:
    file = written(tmp_path / "p.json")
    for found in run_on(2, on_rank, str(file), {}):
        assert found.state.startswith(f"used: {file} of ")
        assert (found.layout.bucket, found.layout.overlap_products) == (1 << 20, True)
        assert found.options == {"tp": Options(nccl={"max_ctas": 8})}


def test_what_the_config_says_goes_before_it(run_on: RunOn, tmp_path: Path) -> None:
    file = written(tmp_path / "p.json")
    for found in run_on(2, on_rank, str(file), {"bucket": 777, "overlap_products": False}):
        assert (found.layout.bucket, found.layout.overlap_products) == (777, False)


def test_what_this_layout_cannot_use_is_not_taken(run_on: RunOn, tmp_path: Path) -> None:
    """The recipe that was tuned cut its sequences, this one does not: with the ring its config would be refused."""
    file = written(tmp_path / "p.json")
    for found in run_on(2, on_rank, str(file), {"sequence_parallel": False}):
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
def test_of_another_key_nothing_is_taken_and_the_reason_is_said(
    run_on: RunOn, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    file = written(tmp_path / "p.json", **changes)
    for found in run_on(2, on_rank, str(file), {}):
        assert found.state.startswith("ignored: ") and said in found.state and found.options == {}
        assert (found.layout.bucket, found.layout.overlap_products) == (0, False)


def test_a_rank_on_another_machine_stops_all_from_using_it(run_on: RunOn, tmp_path: Path) -> None:
    for found in run_on(2, on_rank_elsewhere, str(written(tmp_path / "p.json"))):
        assert found.layout.bucket == 0 and "of rank 1 AMD 486" in found.state


def on_rank_elsewhere(file: str) -> Tuned:
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


def test_the_interface_counts_between_nodes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun names none, `megapre launch local` names the loopback: on one node that is the same link."""
    found = []
    for interface in ("lo", "eth0"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
        found.append((key(CPU, TWO, Mesh(2)), key(CPU, Place(0, 4, 0, 2), Mesh(4))["topology"]))
    assert found[0][0] == found[1][0]
    assert [between for _, between in found] == ["lo", "eth0"]
