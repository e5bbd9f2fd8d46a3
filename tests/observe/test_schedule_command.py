"""`megapre schedule`: what it prints and writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from megapre import cli
from megapre.data import Sidecar, write_sidecar
from megapre.plan import Link
from megapre.plan.comm_profile import write
from megapre.schedule import ScheduleError, build, read


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["megapre", "schedule", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_show_draws_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    files = [f"--{what}={tmp_path}/s.{what}" for what in ("png", "trace", "save")]
    assert run(monkeypatch, "show", "interleaved", "--ranks", "2", "--micro-batches", "4", *files) == 0
    shown = capsys.readouterr().out
    assert "bubble 12.5%" in shown and "\nrank 0  F" in shown and "\x1b" not in shown
    assert read(tmp_path / "s.save") == build("interleaved", 2, 2, 4)
    assert all((tmp_path / f"s.{what}").stat().st_size > 500 for what in ("png", "trace"))


def test_check_of_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("chunks: 1\nmicro-batches: 2\nrank 0: F0.0 F1.0 B0.0 B1.0\nrank 1: F0.0 B0.0 F1.0 B1.0\n")
    assert run(monkeypatch, "check", str(path)) == 0
    assert "mine: 8 actions of 2 ranks, 1 chunk and 2 micro-batches are complete" in capsys.readouterr().out
    assert run(monkeypatch, "check", str(path), "--in-flight", "1") == 1
    assert "rank 0 holds 2 activations after action 1 (F1.0), more than 1" in capsys.readouterr().out
    path.write_text(path.read_text().replace("F1.0 B1.0\n", "B1.0\n"))
    assert run(monkeypatch, "check", str(path)) == 1
    assert capsys.readouterr().out == "rank 1: F1.0 is missing\n"
    path.write_text(path.read_text().replace("micro-batches: 2", "micro-batches: 50"))
    assert run(monkeypatch, "check", str(path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 41 and lines[-1] == "and 153 more"
    path.write_text(path.read_text().replace("micro-batches: 50", "micro-batches: 2"))
    assert run(monkeypatch, "show", str(path)) == 2
    assert "schedule 'mine' cannot run:\n  - rank 1: F1.0 is missing" in capsys.readouterr().err


def test_compare_names_the_best(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "compare", "--ranks", "8", "--micro-batches", "32", "--chunks", "2,4") == 0
    shown = capsys.readouterr().out
    assert "zbv *" in shown and shown.endswith("best: zbv\n")
    assert run(monkeypatch, "compare", "--in-flight", "1") == 1
    assert "no schedule is within 1 micro-batches in flight" in capsys.readouterr().out


def test_compare_of_a_recipe_weighs_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--world", "512", "--micro-batches", "16"]
    assert run(monkeypatch, "compare", "llama3-70b", *sizes) == 0
    shown = capsys.readouterr().out
    assert "tp 8, pp 4, cp 1, dp 16; 16 micro-batches of 1 x 8,192 tokens" in shown and "memory GiB" in shown
    assert run(monkeypatch, "compare", "llama3-70b", *sizes, "--memory", "36") == 0
    assert "best within 36 GiB a rank: 1f1b" in capsys.readouterr().out
    assert run(monkeypatch, "compare", "llama3-70b", "layout.pp=8", *sizes, "--chunks", "3") == 0
    assert "80 layers % (8 * 3) = 8" in capsys.readouterr().out


def test_compare_reads_the_vocabulary_of_the_data_or_says_once_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["compare", "debug", "model.layers=4", "layout.pp=2", f"data.train={tmp_path / 'text'}"]
    assert run(monkeypatch, *words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("set model.vocab") == 1
    write_sidecar(tmp_path / "text", Sidecar("t.json", "0", 300, 0, True, documents=9, tokens=99, bytes=999))
    assert run(monkeypatch, *words) == 0
    assert "best: " in capsys.readouterr().out


def test_a_reason_is_not_said_again_below_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "llama3-70b", "layout.pp=7", "layout.stages=[11,11,11,11,12,12,12]", "--chunks", "3"]
    monkeypatch.setattr("megapre.plan.stages.stage_costs", refuse)
    assert run(monkeypatch, *words) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "compare: no schedule can be built; each row says why"


def refuse(*_: object) -> None:
    raise ScheduleError("schedule: too many layers")


def test_compare_takes_the_measured_link_of_this_layout_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key = {"device": "cuda", "hardware": "NVIDIA H100 80GB HBM3", "nodes": 64, "tp": 8, "pp": 4, "cp": 1, "dp": 16}
    file = tmp_path / "comm-profile.json"
    write(file, key, {"pp": {"send_recv": Link(2.5e-5, 4.21e10)}})
    write(file, {**key, "dtype": "bf16"}, chosen={"bucket_elements": 4096})  # newer, and no link
    words = ["compare", "llama3-70b", "--micro-batches", "16", "--comm-profile", str(file)]
    assert run(monkeypatch, *words, "--world", "512") == 0
    shown = capsys.readouterr().out
    assert "\nmessages: 42.1 GB/s + 25 us, measured" in shown
    assert "\nreplicas: 42.1 GB/s + 25 us, as messages; not measured: " in shown
    assert "\ntensor-parallel ranks: 300 GB/s + 10 us, as given; not measured: " in shown
    assert run(monkeypatch, *words, "--world", "256") == 0
    shown = capsys.readouterr().out
    assert "messages: 50 GB/s + 10 us, as given; not measured: " in shown and "dp was 16 and is 8; measure" in shown
    write(file, {**key, "dp": 8}, {"tp": {"all_reduce": Link(2.5e-5, 4.21e10)}})
    assert run(monkeypatch, *words, "--world", "256") == 0
    assert "has no send_recv of the pp axis" in capsys.readouterr().out


def test_compare_counts_with_the_measured_links_of_tp_and_dp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Slow ones, so that the step and what replicas add to it show that they count."""
    key = {"hardware": "NVIDIA H100 80GB HBM3", "tp": 8, "pp": 4, "cp": 1}
    file = tmp_path / "comm-profile.json"
    both = {name: Link(0.5, 1e12) for name in ("all_gather", "reduce_scatter")}
    write(file, {**key, "dp": 8}, {"tp": both, "dp": both})
    write(file, {**key, "dp": 32}, {"dp": both})
    words = ["compare", "llama3-70b", "--micro-batches", "16", "--world", "512"]
    steps, exposed = [], []
    for more in ([], ["--comm-profile", str(file)]):
        assert run(monkeypatch, *words, *more) == 0
        shown = capsys.readouterr().out
        (row,) = [line.split() for line in shown.splitlines() if line.startswith("1f1b")]
        cells = [cell.replace(",", "") for cell in row if cell != "*"]
        steps.append(float(cells[2]))
        exposed.append(float(cells[6]))
    assert f"replicas: interpolated between those measured among 8 and 32 ranks ({file} of " in shown
    assert f"tensor-parallel ranks: measured among 8 ranks ({file} of " in shown
    assert steps[1] > 1000 * 16 > steps[0], "0.5 s for each layer and collective"
    assert exposed[1] > 500 + exposed[0], "the last bucket's sum, at least"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "1f1c"], "no schedule '1f1c'; did you mean '1f1b'?"),
        (["show", "zbv", "--times", "1,2"], "--times '1,2': three numbers, of F, I and W"),
        (["check", "nowhere.txt"], "nowhere.txt: No such file"),
        (["compare", "llama3-8b"], "layout.pp = 1 is no pipeline"),
        (["compare", "--chunks", "two"], "--chunks 'two': whole numbers"),
        (["compare", "--memory", "70"], "--memory needs a RECIPE"),
        (["compare", "llama3-70b", "--gpu", "abacus"], "no peaks are known of --gpu 'abacus'; known are NVIDIA A100"),
    ],
)
def test_what_is_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_no_torch_is_needed() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['megapre', 'schedule', 'show', '1f1b']; "
        "from megapre import cli; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "bubble 37.5%" in done.stdout, done.stderr
