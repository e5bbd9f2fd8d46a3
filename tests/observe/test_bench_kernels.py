"""`megapre bench kernels`: a request in words becomes cases, rows become a table, files and a profile."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megapre import kernels
from megapre.config import load
from megapre.errors import UserError
from megapre.kernels import profile
from megapre.kernels.bench import cases, sets
from megapre.kernels.bench.row import EVERY, Goal, Held, Row, compare, hold
from megapre.observe import bench_kernels, bench_report, bench_request
from megapre.observe.bench_request import Request

TINY = Request(ops=("rms_norm", "swiglu"), shapes=("T=16,H=32,F=32",), repeats=3, budget=60.0, device="cpu")


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    monkeypatch.setenv("MEGAPRE_KERNEL_PROFILE", str(path))
    monkeypatch.setattr(bench_kernels, "LEAST_BYTES", 0)
    return path


def test_files_hold_the_same_numbers_and_they_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/megapre", "bench", "kernels", "rms_norm"])
    assert bench_kernels.run(TINY, str(tmp_path / "out")) == 0
    out = capsys.readouterr().out
    for word in ("caches emptied before each call", "freed memory is kept", "rms_norm  T=16,H=32  bf16", "copy "):
        assert word in out
    files = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == [".csv", ".json", ".md", ".png"] and all(f"{path}" in out for path in files.values())
    assert files[".png"].read_bytes().startswith(b"\x89PNG") and files[".png"].stat().st_size > 10_000
    content = json.loads(files[".json"].read_text())
    assert content["about"]["command"] == "megapre bench kernels rms_norm" and content["about"]["interrupted"] is False
    with files[".csv"].open() as text:
        table = list(csv.DictReader(text))
    assert len(table) == len(content["rows"]) >= 6
    assert files[".md"].read_text().count("\n| ") == len(table) + 1
    for row, line in zip(content["rows"], table, strict=True):
        assert all(line.pop(name) == str(content["about"][name]) for name in ("hardware", "commit", "date"))
        assert {name: str(value) for name, value in row.items() if value is not None and value != ""} == {
            name: value for name, value in line.items() if value != ""
        }
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["min_ms"] / 1e6)
        assert row["of_ceiling"] == pytest.approx(row["gb_s"] / content["ceilings"]["copy"])
        group = [r for r in content["rows"] if all(r[key] == row[key] for key in ("op", "shape", "mode"))]
        assert row["ratio"] == pytest.approx(min(r["min_ms"] for r in group if r["peer"]) / row["min_ms"])
        assert sum(r["in_use"] for r in group) == 1
    used = kernels.choose("cpu").names
    assert {(r["op"], r["provider"]) for r in content["rows"] if r["in_use"]} == {(op, used[op]) for op in TINY.ops}


def test_a_recipe_gives_the_ops_and_sizes_of_its_model() -> None:
    plans = bench_request.plans(Request(device="cpu"), "cpu")
    built = [plan.build() for plan in plans[:1]]
    assert built[0].sizes["T"] == 2048
    llama, gpt2 = (bench_request.ops_of_model(load(name)) for name in ("llama3-8b", "gpt2-124m"))
    assert {"rms_norm", "rope", "swiglu"} <= llama and not {"layer_norm", "gelu"} & llama
    assert {"layer_norm", "gelu"} <= gpt2 and not {"rms_norm", "rope", "swiglu"} & gpt2
    sizes = bench_request.of_model(load("llama3-8b"), 4096)
    expected = {"T": 4096, "B": 1, "S": 4096, "H": 4096, "N": 32, "K": 8, "D": 128, "F": 14336, "V": 128256, "pad": 0}
    assert sizes.items() >= expected.items() and sizes["P"] == 8_030_261_248
    assert bench_request.of_model(load("gpt2-124m"), 2048).items() >= {"B": 2, "S": 1024, "V": 50304, "pad": 47}.items()
    assert bench_request.of_model(load("debug"), 1)["T"] == 1
    linear = [(z["I"], z["O"]) for z in sets.of_sizes("linear", sizes)]
    assert linear == [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
    variants = [{k: z[k] for k in ("documents", "window") if k in z} for z in sets.of_sizes("attention", sizes)]
    assert variants == [{}, {"documents": 4}, {"window": 1024}]
    assert all(z["P"] <= sets.MOST_PARAMETERS for z in sets.of_sizes("adamw_", sizes))
    assert all(z["T"] * z["V"] <= sets.MOST_LOGITS for z in sets.of_sizes("cross_entropy", sizes))


def test_explicit_sizes_are_taken_as_they_are() -> None:
    assert bench_request.parse("T=2048, H=4096") == {"T": 2048, "H": 4096}
    for plan in bench_request.plans(replace(TINY, ops=()), "cpu"):
        assert cases.NEEDS[plan.build().op] in (("T", "H"), ("T", "F"))
    request = Request(ops=("attention",), shapes=("B=2,S=8,N=4,K=2,D=8,documents=2",), device="cpu")
    (plan,) = bench_request.plans(request, "cpu")
    assert plan.build().shape == "B=2,S=8,N=4,K=2,D=8,documents=2"


def test_the_set_of_targets_has_each_with_its_goal() -> None:
    plans = bench_request.plans(Request(named_set="targets", device="cpu"), "cpu")
    assert len(plans) == len(sets.TARGETS)
    assert all(plan.goals and set(plan.modes) == set(plan.goals) for plan in plans)
    some = bench_request.plans(Request(ops=("swiglu",), named_set="targets", device="cpu"), "cpu")
    assert [plan.goals for plan in some] == [{mode: (Goal(6.0, "torch"),) for mode in ("forward", "backward")}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": ("rmsnorm",)}, r"no op 'rmsnorm' \(did you mean rms_norm\?\)"),
        ({"shapes": ("gpt2-124",)}, "did you mean 'gpt2-124m'"),
        ({"shapes": ("T=16,X=3",)}, "no size 'X'; there are T, B, S"),
        ({"shapes": ("T=0,H=3",)}, "T=0: tokens must be a whole number from 1"),
        ({"shapes": ("T=16",)}, "rms_norm needs the sizes T, H; given are T"),
        ({"shapes": ("S=16",), "ops": ()}, "no op has the sizes S alone"),
        ({"shapes": ("T=8,N=3,K=2,D=8",), "ops": ("attention",)}, "N = 3 query heads are no multiple of K = 2"),
        ({"shapes": ("T=8,N=3,D=7",), "ops": ("rope",)}, "the head dim must be even"),
        ({"shapes": ("T=8,N=2,D=8,documents=9",), "ops": ("attention",)}, "9 documents do not fit a row of 8"),
        ({"shapes": ("T=8,V=8,pad=8",), "ops": ("cross_entropy",)}, "pad = 8 leaves none"),
        ({"dtypes": ("bf61",)}, r"no dtype 'bf61' \(did you mean bf16\?\); the dtypes are bf16, fp16"),
        ({"providers": ("natve",)}, r"no provider 'natve' \(did you mean native\?\)"),
        ({"providers": ("triton",)}, "triton cannot run on cpu: "),
        ({"modes": ("forwards",)}, r"no mode 'forwards' \(did you mean forward\?\)"),
        ({"named_set": "target", "shapes": ()}, r"no set 'target' \(did you mean targets\?\)"),
        ({"named_set": "gpu-quick", "shapes": ()}, "gpu-quick has sizes and goals of a GPU, .* --set targets"),
        ({"named_set": "gpu", "shapes": ()}, "the set gpu has sizes and goals of a GPU"),
        ({"named_set": "targets"}, "leave out --set or --shape"),
        ({"ops": ("swiglu",), "policies": True}, "--policies is for rms_norm, layer_norm, "),
        ({"named_set": "targets", "shapes": (), "ops": ("gelu",)}, "has no case of gelu; it has rms_norm"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_request.plans(replace(TINY, **change), "cpu")  # type: ignore[arg-type]


def test_a_profile_is_written_and_used(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = replace(TINY, dtypes=("bf16", "fp32"))
    assert bench_kernels.run(request, None, True) == 0
    assert f"profile written to {file}" in capsys.readouterr().out
    known = profile.load("cpu").ops
    assert set(known) == {"rms_norm", "swiglu"} and set(known["swiglu"]) == {"bf16", "fp32"}
    names = {row.implementation for row in kernels.table("cpu") if row.op == "rms_norm" and row.available}
    assert set(known["rms_norm"]["bf16"]["T=16,H=32"]) == names - {"reference"}


def test_a_profile_needs_what_it_compares(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, message in (
        ({"modes": ("forward",)}, "the mode full"),
        ({"providers": ("torch",)}, "leave out --provider"),
        ({"cold": False}, "leave out --warm"),
        ({"keep_memory": False}, "leave out --return-memory"),
    ):
        with pytest.raises(UserError, match=message):
            bench_kernels.run(replace(TINY, **change), None, True)  # type: ignore[arg-type]
    monkeypatch.setattr(bench_kernels, "LEAST_BYTES", 1 << 20)
    with pytest.raises(UserError, match="no profile is written"):
        bench_kernels.run(TINY, None, True)
    monkeypatch.setenv("MEGAPRE_KERNEL_PROFILE", "off")
    with pytest.raises(UserError, match="unset it to write one"):
        bench_kernels.run(TINY, None, True)
    assert not file.exists()


def test_without_matplotlib_there_is_no_picture_and_a_word_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench_kernels.run(replace(TINY, ops=("swiglu",), modes=("full",)), str(tmp_path)) == 0
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".md"]


def test_what_the_budget_leaves_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.run(replace(TINY, budget=1e-9)) == 0
    assert "2 of 2 cases were not finished; raise --budget, or name fewer ops" in capsys.readouterr().out


def test_what_could_not_be_timed_is_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    wide = Request(ops=("attention",), shapes=("T=8,N=2,D=512",), repeats=1, device="cpu")
    if kernels.choose("cpu").names["attention"] == "native":
        assert bench_kernels.run(wide) == 0
        assert "native was not timed: ValueError: attention: head dim 512; native " in capsys.readouterr().out


def test_providers_that_none_of_the_ops_has_here_are_an_error() -> None:
    with pytest.raises(UserError, match="these ops have no cudnn on cpu; --list shows"):
        bench_kernels.run(replace(TINY, ops=("swiglu",), providers=("cudnn",)))


def test_only_a_failure_of_ours_fails_a_run() -> None:
    def row(provider: str, note: str, peer: bool = False) -> Row:
        return Row("swiglu", "T=1,F=2", "bf16", "full", provider, peer, False, note=note)

    for told in ("wrong: 1.0e+00 off", "RuntimeError: CUDA error"):
        assert bench_kernels.broken(row("triton", told))
        assert not bench_kernels.broken(row("liger", told, peer=True))
        assert not bench_kernels.broken(row("triton policy 1,2", told))
        assert not bench_kernels.broken(row("sdpa", told)), "torch's, unless it is what runs"
    for told in ("", "skipped: the budget is spent", "ValueError: head dim 512"):
        assert not bench_kernels.broken(row("triton", told))
    assert bench_kernels.broken(row(EVERY, "AcceleratorError: CUDA error: an illegal memory access was encountered"))
    assert not bench_kernels.broken(row(EVERY, "OutOfMemoryError: CUDA out of memory."))


def test_a_gpus_table_has_graphs_memory_errors_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("rms_norm", "T=8192,H=4096", "bf16", "forward", name, name == "torch", name == "triton") for name in
            ("triton", "torch", "cuda")]  # fmt: skip
    for row, ms in zip(rows, (0.035, 0.046), strict=False):
        row.flops, row.bytes = 1 << 27, 1 << 27
        row.time([ms] * 7, "median")
        row.wall_ms, row.graph_ms, row.error, row.peak_mib = 0.05, ms, 1.7e-3, 64.0
    rows[1].graph_ms, rows[1].graph_note, rows[2].note = 0.0, "waits for the device: RuntimeError", "RuntimeError: no"
    compare(rows)
    rows[0].of_ceiling, rows[2].error = 0.893, float("inf")
    held = list(hold(rows, {"forward": (Goal(90, "%"), Goal(2, "torch"))}))
    about = {"hardware": "H200", "device": "cuda", "commit": "abc", "date": "today", "cases": 2, "cases_measured": 1}
    report = bench_kernels.Report(about, {"copy": 4300.0, "product bf16": 790.0}, rows, held)
    console = Console(width=bench_report.WIDTH)
    for renderable in bench_report.tables(report):
        console.print(renderable)
    out = capsys.readouterr().out
    for words in (
        "forward    triton *             0.0350      0.0350-0.0350     0.0350     0.0500       3835 GB/s         89%",
        "torch has no graph: waits for the device: RuntimeError",
        "cuda was not timed: RuntimeError: no",
        "goals  0 of 4 met",
        "product bf16 790000 GFLOP/s",
        "1 of 2 cases were not finished",
    ):
        assert words in out, out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "rms_norm T=8192,H=4096 forward triton * >= 90 % 89.3 % not met" in lines
    assert "rms_norm T=8192,H=4096 forward cuda >= 2x torch not measured" in lines
    bench_report.write(report, str(tmp_path), picture=False)
    (file,) = tmp_path.glob("kernels_cuda_h200_today.json")
    content = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert [goal["verdict"] for goal in content["goals"]] == ["not met", "not measured"] * 2
    assert [row["error"] for row in content["rows"]] == [1.7e-3, 1.7e-3, None]
    (file,) = tmp_path.glob("*.md")
    assert "| forward | triton * | >= 90 % | 89.3 % | not met |" in file.read_text()
    assert len(list(tmp_path.iterdir())) == 3, "nothing temporary stays"


@pytest.mark.parametrize("width", [60, bench_report.WIDTH])
def test_no_cell_of_a_goal_is_cut(width: int) -> None:
    sizes = "B=2,S=16384,N=64,K=8,D=128,documents=8,window=4096"
    cells = ("vocab_parallel_linear_cross_entropy", sizes, "backward", "triton block=4096,warps=16,programs=1056")
    held = [Held(*cells, False, ">= 0.97x best peer", "0.912x best peer", met) for met in (None, False)]
    console = Console(width=width, record=True, file=io.StringIO())
    for renderable in bench_report.goals(held):
        console.print(renderable)
    lines = console.export_text().splitlines()
    wanted = [*cells, held[0].goal, held[0].reached]
    if width == bench_report.WIDTH:
        assert sum(all(cell in line for cell in wanted) for line in lines) == 2
    letters = Counter("".join(lines[1:]).replace(" ", ""))  # of folded cells the lines lie beside each other
    told = "".join(["op shape mode provider goal reached", *wanted, *wanted, "not measured", "not met"])
    assert letters == Counter(told.replace(" ", ""))


def test_numbers_are_short() -> None:
    assert [bench_report.number(ms) for ms in (0.0123456, 1.23456, 12.3456)] == ["0.0123", "1.235", "12.3"]


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megapre", "bench", "kernels", "swiglu", "linear_cross_entropy"]
    command += ["--shape", "T=64,F=64,H=64,V=512", "--repeats", "1000000", "--budget", "40", "--mode", "full"]
    command += ["--out", str(tmp_path), "--device", "cpu", "--threads", "1"]
    code = "import sys; sys.argv = ['megapre', *sys.argv[1:]]\nfrom megapre.kernels.bench import run\n"
    code += "inner = run.Runner._measure\ndef measure(self, case, *rest):\n    print(case.op, flush=True)\n"
    code += "    inner(self, case, *rest)\nrun.Runner._measure = measure\nfrom megapre.cli import main\nmain()\n"
    environment = {**os.environ, "MEGAPRE_KERNEL_PROFILE": "off"}
    process = subprocess.Popen(
        [command[0], "-c", code, *command[3:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    while "linear_cross_entropy" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "megapre: interrupted" in out and "swiglu  T=64,F=64  bf16" in out and "1 of 2 cases" in out
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert content["about"]["interrupted"] is True and {row["op"] for row in content["rows"]} == {"swiglu"}
