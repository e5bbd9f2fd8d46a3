"""`megapre bench comm`, `tune comm` and `bench step` on real ranks, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megapre.plan.comm_profile import read


def started(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}
    environment.pop("MEGAPRE_COMM_PROFILE", None)
    command = [sys.executable, "-m", "megapre", "launch", "local", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_both_commands_write_one_profile(tmp_path: Path) -> None:
    sizes = ("--from", "4KiB", "--to", "4MiB", "--factor", "32", "--repeats", "5")
    bench = started(tmp_path, "--nproc", "4", "bench", "comm", "--layout", "tp=2,pp=2", *sizes, "--write-profile")
    assert bench.returncode == 0, bench.stderr
    assert "[0] all_reduce  tp of 2 ranks" in bench.stdout and "send_recv  pp of 2 ranks" in bench.stdout
    assert bench.stdout.count("correct") == (2 + 2 * 6) * 3 and "[1]" not in bench.stdout
    words = ("layout.tp=2", "layout.pp=2", "model.vocab=512", "--rounds", "3", "--budget", "5", "--out", "out")
    tune = started(tmp_path, "--nproc", "4", "tune", "comm", "debug", *words)
    assert tune.returncode == 0, tune.stderr
    assert "products of tp  default overlap_products = false" in tune.stdout
    assert "left out: buckets: there are no replicas, dp = 1" in tune.stdout
    links, chosen = read(tmp_path / "config" / "megapre" / "comm-profile.json")
    assert (links.key["tp"], links.key["pp"], links.key["backend"]) == (2, 2, "gloo")
    assert set(links.links) <= {"tp", "pp", "world"} and links.links and links.chosen is None
    assert links.key.items() < chosen.key.items() and chosen.chosen is not None
    assert (chosen.key["hidden"], chosen.key["dtype"]) == (64, "fp32")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_buckets_are_compared_between_replicas(tmp_path: Path) -> None:
    words = ("model.vocab=512", "--only", "buckets", "--rounds", "2", "--profile", "mine.json")
    tune = started(tmp_path, "--nproc", "2", "tune", "comm", "debug", *words)
    assert tune.returncode == 0, tune.stderr
    assert "buckets of dp  default 25,000,000 elements" in tune.stdout and "refused" not in tune.stdout
    assert "runs with layout.comm_profile=mine.json use it" in tune.stdout and (tmp_path / "mine.json").exists()


def test_the_step_of_a_layout_is_timed(tmp_path: Path) -> None:
    sizes = ("batch.global=4", "batch.micro=1", "model.vocab=512", "--steps", "2", "--json", "step.json")
    done = started(tmp_path, "--nproc", "2", "bench", "step", "debug", "layout.pp=2", *sizes)
    assert done.returncode == 0, done.stderr
    assert "[0] debug on 2 ranks" in done.stdout and "[1]" not in done.stdout
    assert json.loads((tmp_path / "step.json").read_text())["layout"]["pp"] == 2


def test_errors_are_told_without_a_traceback(tmp_path: Path) -> None:
    wrong = started(tmp_path, "--nproc", "2", "bench", "comm", "--layout", "tp=3")
    assert wrong.returncode == 2 and wrong.stdout == "" and "rank 1 said the same" in wrong.stderr.replace("0", "1")
    assert wrong.stderr.count("a world of 2 ranks cannot be cut into replicas of tp*pp*cp = 3") == 1
    assert "Traceback" not in wrong.stdout + wrong.stderr
    unsaid = started(tmp_path, "bench", "comm")
    assert unsaid.returncode == 2 and "bench comm needs --nproc" in unsaid.stderr
