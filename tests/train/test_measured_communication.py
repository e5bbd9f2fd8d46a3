"""A run takes what `megapre tune comm` chose for its ranks, and says so."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from megapre.config import load
from megapre.data import with_vocab_of_data
from megapre.mesh import Mesh
from megapre.parallel.comm import AXES, Options, Place
from megapre.parallel.tuned import key, options, work
from megapre.plan.comm_profile import write
from megapre.train.step import Engine


@pytest.fixture
def profile(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two ranks of this machine that cut a model."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    cpu = torch.device("cpu")
    cfg = load("debug", [f'data.train=["{corpus}"]', "layout.tp=2", "batch.micro=1"])
    here = {**key(cpu, Place(0, 2, 0, 2), Mesh(2, tp=2)), **work(with_vocab_of_data(cfg), cpu), "threads": 1}
    write(tmp_path / "p.json", here, chosen={"bucket_elements": 4096, "overlap_products": True})
    return tmp_path / "p.json"


def trained(corpus: Path, folder: Path, *overrides: str) -> tuple[str, dict[str, Any]]:
    """What two ranks say, and the layout in the config of their run folder."""
    fixed = [f'data.train=["{corpus}"]', "data.split=8,2,0", f"run.dir={folder}", "name=run", "run.steps=5"]
    fast = ["run.eval_every=0", "batch.global=4", "batch.micro=1", "run.device=cpu", "run.tensorboard=false"]
    command = [sys.executable, "-m", "megapre", "launch", "local", "--nproc", "2", "debug", *fixed, *fast, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, tomllib.loads((folder / "run" / "config.toml").read_text())["layout"]


def test_a_run_on_the_ranks_measured_uses_the_profile(corpus: Path, tmp_path: Path, profile: Path) -> None:
    said, layout = trained(corpus, tmp_path, "layout.tp=2", f"layout.comm_profile={profile}")
    assert "communication profile used: " in said and "bucket = 4096, overlap_products = True" in said
    assert (layout["bucket"], layout["overlap_products"]) == (4096, True)


def test_a_run_on_others_says_so_once_and_goes_on_without(corpus: Path, tmp_path: Path, profile: Path) -> None:
    said, layout = trained(corpus, tmp_path, f"layout.comm_profile={profile}")
    assert (
        said.count("communication profile ignored: ") == 1
        and "Warning" not in said
        and "tp was 2 and is 1; dp was 1 and is 2" in said
    )
    assert (layout["bucket"], layout["overlap_products"]) == (0, False)


def test_buckets_are_as_large_as_the_layout_says() -> None:
    cut = Engine(load("debug", ["model.vocab=512", "layout.bucket=4096"]), torch.device("cpu")).flat.groups
    whole = Engine(load("debug", ["model.vocab=512"]), torch.device("cpu")).flat.groups
    assert max(len(group.buckets) for group in whole) == 1 < max(len(group.buckets) for group in cut)


def test_what_the_config_says_of_communicators_goes_before_what_was_measured() -> None:
    cfg = load(
        "debug", ["comm.timeout=60", "comm.timeouts.send=5", "comm.nccl.dp.max_ctas=8", 'comm.high_priority=["tp"]']
    )
    measured = {"dp": Options(nccl={"max_ctas": 16, "min_ctas": 2}), "tp": Options(environment={"NCCL_ALGO": "Ring"})}
    found = options(cfg.comm, measured)
    assert found["dp"] == Options(60.0, False, {"max_ctas": 8, "min_ctas": 2})
    assert found["tp"] == Options(60.0, True, {}, {"NCCL_ALGO": "Ring"})
    assert found["send"].timeout == 5.0 and set(found) == set(AXES)


@pytest.mark.parametrize(
    "override", ["comm.nccl.dq.max_ctas=8", "comm.timeout=0", "comm.timeouts.send=-1", "comm.nccl.dp.max_ctas=0"]
)
def test_options_that_there_are_not_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match=override.partition("=")[0].rpartition(".")[0].replace(".", r"\.")):
        load("debug", [override])
