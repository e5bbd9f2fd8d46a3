"""What a run takes from a communication profile: all of it on the machines measured, nothing elsewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn

from megapre.config import Config, load
from megapre.mesh import Mesh
from megapre.parallel import tuned as tuning
from megapre.parallel.comm import CommError, Options, Place
from megapre.parallel.tuned import Tuned, key, options_of, tuned, work
from megapre.plan.comm_profile import write

CPU = torch.device("cpu")
CHOSEN = {"bucket_elements": 1 << 20, "overlap_products": True, "options": {"tp": {"nccl": {"max_ctas": 8}}}}
TWO = Place(0, 2, 0, 2)


def recipe(*overrides: str) -> Config:
    return load("debug", ["layout.tp=2", "model.vocab=512", *overrides])


def key_of(cfg: Config) -> dict[str, str | int]:
    """Of what the pool's ranks, which have one thread each, do with `cfg`."""
    return {**key(CPU, TWO, Mesh(2, tp=2)), **work(cfg, CPU), "threads": 1}


def written(file: Path, **changes: Any) -> Path:
    write(file, {**key_of(recipe()), **changes}, chosen=CHOSEN)
    return file


def on_rank(file: str, *overrides: str) -> Tuned:
    rank = dist.get_rank()
    return tuned(recipe(f"layout.comm_profile={file}", *overrides), Place(rank, 2, rank, 2), CPU)


def test_the_profile_of_these_ranks_fills_in_what_the_config_leaves_open(run_on: RunOn, tmp_path: Path) -> None:
    file = written(tmp_path / "p.json")
    for found in run_on(2, on_rank, str(file)):
        assert found.state.startswith(f"used: {file} of ")
        assert (found.layout.bucket, found.layout.overlap_products) == (1 << 20, True)
        assert found.options == {"tp": Options(nccl={"max_ctas": 8})}


def test_what_the_config_says_goes_before_it(run_on: RunOn, tmp_path: Path) -> None:
    file = written(tmp_path / "p.json")
    for found in run_on(2, on_rank, str(file), "layout.bucket=777", "layout.overlap_products=false"):
        assert (found.layout.bucket, found.layout.overlap_products) == (777, False)


def test_what_this_layout_cannot_use_is_not_taken(run_on: RunOn, tmp_path: Path) -> None:
    """A profile may say what its recipe had no use for: with the ring this config would be refused."""
    file = written(tmp_path / "p.json", sequence_parallel="false")
    for found in run_on(2, on_rank, str(file), "layout.sequence_parallel=false"):
        assert (found.layout.bucket, found.layout.overlap_products) == (1 << 20, False)
        assert "bucket = 1048576" in found.state and "overlap_products" not in found.state


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.layers=4", r"gradients_of_a_rank was [0-9]+ and is [0-9]+; measure again"),
        ("model.hidden=128", "hidden was 64 and is 128"),
        ("model.ffn=256", "ffn was 192 and is 256"),
        ("model.vocab=9000", "gradients_of_a_rank was "),
        ("batch.micro=1", r"tokens was [0-9]+ and is [0-9]+; measure again"),
        ("batch.seq_length=32", r"tokens was [0-9]+ and is [0-9]+; measure again"),
        ("run.dtype=bf16", "dtype was fp32 and is bf16"),
        ("layout.shard_optimizer=false", "shard_optimizer was true and is false"),
        ("layout.sequence_parallel=false", "sequence_parallel was true and is false"),
        ("kernels.linear=torch", "linear was native and is torch"),
        ("run.threads=3", ""),  # is not torch's number of threads, which the ranks have set
    ],
)
def test_settings_count_for_the_work_that_they_were_chosen_for_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    alone, file = recipe("layout.tp=1"), tmp_path / "p.json"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    write(file, {**key(CPU, Place(), Mesh(1)), **work(alone, CPU)}, chosen=CHOSEN)
    found = tuned(recipe("layout.tp=1", f"layout.comm_profile={file}", override), Place(), CPU)
    assert found.state.startswith("ignored: " if said else "used: ")
    assert re.search(said, found.state), found.state
    assert (found.layout.bucket == 0) == bool(said)


def test_gradients_in_bf16_and_other_threads_are_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = work(recipe("run.dtype=bf16"), CPU)
    assert work(recipe("run.dtype=bf16", "optim.grad_dtype=bf16"), CPU) == {**whole, "grad_dtype": "bf16"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert work(recipe("run.dtype=bf16"), CPU) == {**whole, "threads": 17}


def test_an_entry_of_before_the_work_was_part_of_the_key_is_refused(run_on: RunOn, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    write(file, key(CPU, TWO, Mesh(2, tp=2)), chosen=CHOSEN)
    for found in run_on(2, on_rank, str(file)):
        assert found.layout.bucket == 0 and "hidden was not given and is 64" in found.state


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
    for found in run_on(2, on_rank, str(file)):
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
        return on_rank(file)
    finally:
        tuning.machine = real


def test_no_profile_is_looked_for_unless_it_is_named() -> None:
    found = tuned(recipe("layout.bucket=5"), TWO, CPU)
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
