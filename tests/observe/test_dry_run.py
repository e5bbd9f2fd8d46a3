"""`megapre train --dry-run`: what it prints for layouts of any size, what it refuses, that it needs no torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megapre.config import ConfigError, load
from megapre.data import Sidecar, write_sidecar
from megapre.mesh import MeshError
from megapre.observe import dry_run
from megapre.plan import Link
from megapre.plan.comm_profile import write as write_profile
from megapre.plan.hardware import UnknownDevice
from megapre.plan.partition import StageError
from megapre.schedule import ScheduleError, build, write


def test_a_layout_of_sixteen_thousand_ranks_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["layout.tp=8", "layout.pp=16", "layout.vpp=2", "layout.balance=true", "batch.global=2048"]
    assert dry_run.run(load("llama3-405b", overrides), 16384) == 0
    out = capsys.readouterr().out
    assert "16384 ranks = pp 16 x dp 128 x cp 1 x tp 8" in out
    rows = [line for line in out.splitlines() if line.startswith("pp ")]
    assert len(rows) == 16
    assert rows[0].startswith("pp 0    embedding + 0-") and "125 + head" in rows[-1]
    assert "rank 15 " in out and "interleaved: 16 ranks x 2 chunks, 16 micro-batches: takes" in out


def test_every_layer_is_somewhere_and_shares_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run.run(load("llama3-8b", ["layout.pp=4", "layout.tp=1"]))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("rank   layers"))
    assert [line.split("   ")[1].strip() for line in lines[start + 1 : start + 5]] == [
        "embedding + 0-7",
        "8-15",
        "16-23",
        "24-31 + head",
    ]
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[start + 1 : start + 5]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares[3] > shares[0] > 20
    assert lines[start + 5].startswith("the fullest rank has 1.184 times the mean")
    assert lines[start + 5].endswith("stages [8, 9, 9, 6]")


def test_a_schedule_of_ones_own_is_planned_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    layout = ["layout.pp=2", "layout.vpp=2", "layout.tp=1", "batch.global=6", "batch.micro=1"]
    write(build("dualpipev", 2, 2, 6), path)
    shown = []
    for name in ("dualpipev", str(path)):
        dry_run.run(load("llama3-8b", [*layout, f"layout.schedule={name}"]))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "embedding + 0-7, 24-31 + head" in shown[0]
    path.write_text(path.read_text().replace("F5.0 ", "", 1))
    with pytest.raises(ScheduleError, match=r"rank 0: F5.0 is missing"):
        dry_run.run(load("llama3-8b", [*layout, f"layout.schedule={path}"]))
    with pytest.raises(ScheduleError, match=r"for 6 micro-batches, but batch.global / \(batch.micro \* dp\) = 3"):
        dry_run.run(load("llama3-8b", [*layout, f"layout.schedule={path}"]), 4)


def test_one_stage_needs_no_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run.run(load("gpt2-124m", ["model.vocab=50257"]), 8)
    out = capsys.readouterr().out
    assert "8 ranks = pp 1 x dp 8" in out and "rank 0" not in out


def test_the_vocabulary_is_that_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sidecar(tmp_path / "text", Sidecar("t.json", "0", 300, 0, True, documents=9, tokens=99, bytes=999))
    recipe = ["layout.pp=2", "batch.micro=1", f"data.train={tmp_path / 'text'}"]
    shown = []
    for vocab in ("model.vocab=0", "model.vocab=300"):
        assert dry_run.run(load("debug", [*recipe, vocab])) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "vocab 300" in shown[0]
    with pytest.raises(StageError, match=r"no PREFIX.meta.json is here; set model.vocab"):
        dry_run.run(load("debug", [*recipe[:2], f"data.train={tmp_path / 'elsewhere'}"]))


def test_what_cannot_be_is_told_before_anything_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MeshError, match="a world of 6 ranks cannot be cut"):
        dry_run.run(load("llama3-8b", ["layout.pp=4", "layout.tp=1"]), 6)
    with pytest.raises(ConfigError, match=r"batch: global = 512 sequences cannot be cut"):
        dry_run.run(load("llama3-8b", ["layout.pp=4", "layout.tp=1"]), 12)
    with pytest.raises(StageError, match=r"set model.vocab"):
        dry_run.run(load("llama3-8b", ["layout.pp=4", "model.vocab=0"]))
    assert capsys.readouterr().out == ""


def drawn(out: str) -> list[str]:
    return [line.partition("  ")[2] for line in out.splitlines() if line.startswith("rank ") and "layers" not in line]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_tiny_model_is_drawn_without_the_messages_that_would_hide_it(
    capsys: pytest.CaptureFixture[str], schedule: str
) -> None:
    """Every action of it has a letter and its micro-batch, where messages take tens of times as long."""
    demo = load("demo", ["layout.pp=4", "model.vocab=512", "batch.micro=1", f"layout.schedule={schedule}"])
    dry_run.run(demo)
    out = capsys.readouterr().out
    table = build(schedule, ranks=4, chunks=1, micro_batches=4)
    for row, program in zip(drawn(out), table, strict=True):
        assert "".join(filter(str.isalpha, row)) == "".join(action.kind for action in program)
    assert re.search(r"as if messages took no time: one takes 15.2 us here, actions 0\.\d+ to [12]\.\d+ us. With", out)
    assert "bubble 1" in out.splitlines()[-2]


def test_a_large_model_is_drawn_with_its_messages(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run.run(load("llama3-8b", ["layout.pp=4", "layout.tp=1", "batch.global=8"]))
    out = capsys.readouterr().out
    assert "as if messages" not in out
    assert len(drawn(out)) == 4 and all(row.count("F") >= 8 for row in drawn(out))


def test_measured_links_are_counted_and_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    write_profile(
        file,
        {"hardware": dry_run.GPU, "tp": 2, "pp": 4, "cp": 1, "dp": 1},
        {
            "pp": {"send_recv": Link(1e-3, 1e9)},
            "tp": {name: Link(1e-3, 1e9) for name in ("all_gather", "reduce_scatter")},
        },
    )
    layout = ["layout.pp=4", "layout.tp=2", "batch.global=8"]
    takes = []
    for profile in ("", str(file)):
        dry_run.run(load("llama3-8b", [*layout, f"layout.comm_profile={profile}"]))
        out = capsys.readouterr().out
        takes.append(float(out.split("takes ")[1].split(",")[0]))
        assert ("messages: 1 GB/s + 1000 us, measured" in out) == bool(profile)
        assert (f"tensor-parallel ranks: measured among 2 ranks ({file} of " in out) == bool(profile)
    assert takes[1] > 1.5 * takes[0]


def test_another_gpu_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run.run(load("llama3-8b", ["layout.pp=4"]), gpu="NVIDIA H200") == 0
    out = capsys.readouterr().out
    assert "device      NVIDIA H200" in out and "seconds on NVIDIA H200 at" in out and "H100" not in out
    dry_run.run(load("llama3-8b", ["layout.pp=4"]), gpu="h200")
    assert capsys.readouterr().out == out
    with pytest.raises(UnknownDevice, match=r"--gpu 'abacus'; known are NVIDIA A100"):
        dry_run.run(load("llama3-8b"), gpu="abacus")


def test_the_world_is_taken_from_the_overrides() -> None:
    assert dry_run.world_of(["a.b=1", "world=16", "c=2"]) == (16, ("a.b=1", "c=2"))
    assert dry_run.world_of(["a.b=1"]) == (0, ("a.b=1",))
    for text in ("0", "-1", "many", "²"):
        with pytest.raises(dry_run.DryRunError, match="a number of ranks"):
            dry_run.world_of([f"world={text}"])


def test_the_command_line_needs_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None\nfrom megapre.cli import main\nmain()"
    command = [sys.executable, "-c", script, "train", "llama3-8b", "layout.pp=4", "--dry-run", "world=64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "64 ranks = pp 4" in done.stdout
    refused = subprocess.run([*command[:-2], "world=64"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "world: no such key" in refused.stderr
