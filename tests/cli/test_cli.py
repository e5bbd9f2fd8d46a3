"""The command line: options reach the doors, errors are one message and exit code 2, help needs click alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import create_autospec

import click
import pytest

import megapre.data.tokenize
import megapre.data.tokenizer
import megapre.launch.local
import megapre.observe.bench_comm
import megapre.observe.bench_kernels
import megapre.observe.tune_comm
import megapre.train.bench
import megapre.train.evaluate
import megapre.train.loop
import megapre.train.sample
from megapre import cli
from megapre.config import load, to_toml
from megapre.parallel.comm import RanksError

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls `megapre` with these arguments in this process; returns the exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["megapre", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return call


def door(monkeypatch: pytest.MonkeyPatch, where: object, name: str, result: object = None) -> "object":
    """Puts a stand-in with the same signature before the door, and returns it."""
    stand_in = create_autospec(getattr(where, name), return_value=result)
    monkeypatch.setattr(where, name, stand_in)
    return stand_in


def test_train_passes_config_and_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = door(monkeypatch, megapre.train.loop, "run", 75)
    assert run("train", "debug", "optim.lr=1e-3", "--resume", "run.steps=7") == 75  # the door's own code
    loop.assert_called_once_with(  # type: ignore[attr-defined]
        load("debug", ["optim.lr=1e-3", "run.steps=7"]), resume=True, reorder=False
    )
    assert run("train", "debug", "--resume", "--reorder-data") == 75
    assert loop.call_args.kwargs == {"resume": True, "reorder": True}  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", [("train",), ("launch", "local")])
def test_another_order_is_for_a_run_that_goes_on(
    run: Run, verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*verb, "debug", "--reorder-data") == 2
    assert "--reorder-data is for a run that goes on: it needs --resume" in capsys.readouterr().err


def test_print_config_reproduces_the_config(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("train", "llama3-8b", "layout.tp=4", "--print-config") == 0
    copy = tmp_path / "copy.toml"
    copy.write_text(capsys.readouterr().out)
    assert load(str(copy)) == load("llama3-8b", ["layout.tp=4"])
    assert to_toml(load(str(copy))) == copy.read_text()


def test_tokenize(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = door(monkeypatch, megapre.data.tokenize, "run")
    options = (
        "--tokenizer t.json --output-prefix out/x --json-key body --workers 3 --no-eos --on-error skip --separator ---"
    )
    assert run("tokenize", "a.txt", "b.jsonl.zst", *options.split()) == 0
    tokenize.assert_called_once_with(  # type: ignore[attr-defined]
        ("a.txt", "b.jsonl.zst"),
        "out/x",
        "t.json",
        json_key="body",
        workers=3,
        append_eos=False,
        on_error="skip",
        separator="---",
    )


def test_tokenizer_train(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    train = door(monkeypatch, megapre.data.tokenizer, "train_tokenizer")
    assert (
        run("tokenizer", "train", "a.txt", "--kind", "sentencepiece", "--vocab-size", "99", "--output", "t.model") == 0
    )
    train.assert_called_once_with(  # type: ignore[attr-defined]
        ("a.txt",), kind="sentencepiece", vocab_size=99, out="t.model", json_key="text"
    )


def test_eval_and_sample(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = door(monkeypatch, megapre.train.evaluate, "run", [])
    sample = door(monkeypatch, megapre.train.sample, "run", [])
    assert run("eval", "runs/x", "--data", "d", "--batches", "4", "--device", "cpu") == 0
    evaluate.assert_called_once_with("runs/x", "d", batches=4, device="cpu")  # type: ignore[attr-defined]
    options = "--max-new-tokens 5 --temperature 0 --top-k 3 --top-p 0.5 --seed 9 --num-samples 2 --explain"
    assert run("sample", "runs/x", "--prompt", "once upon", *options.split()) == 0
    sample.assert_called_once_with(  # type: ignore[attr-defined]
        "runs/x",
        "once upon",
        max_new_tokens=5,
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        seed=9,
        num_samples=2,
        explain=True,
        device="auto",
    )


def test_bench_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = door(monkeypatch, megapre.train.bench, "step", {})
    assert run("bench", "step", "debug", "batch.micro=4", "--steps", "2", "--warmup", "0", "--json", "r.json") == 0
    bench.assert_called_once_with(  # type: ignore[attr-defined]
        load("debug", ["batch.micro=4"]), steps=2, warmup=0, json_path="r.json"
    )


def test_bench_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    bench = door(monkeypatch, megapre.observe.bench_kernels, "run", 0)
    assert run("bench", "kernels") == 0
    bench.assert_called_once_with(megapre.observe.bench_kernels.Request(), None, False)  # type: ignore[attr-defined]
    options = "--shape T=8,H=8 --shape llama3-8b --tokens 9 --dtype bf16,fp32 --provider native,torch --mode full"
    options += " --device cpu --threads 1 --repeats 3 --budget 7 --warm --return-memory --out o --write-profile"
    assert run("bench", "kernels", "rms_norm", "rope", *options.split()) == 0
    request = megapre.observe.bench_kernels.Request(
        ops=("rms_norm", "rope"),
        shapes=("T=8,H=8", "llama3-8b"),
        tokens=9,
        dtypes=("bf16", "fp32"),
        providers=("native", "torch"),
        modes=("full",),
        device="cpu",
        threads=1,
        repeats=3,
        budget=7.0,
        cold=False,
        keep_memory=False,
    )
    bench.assert_called_with(request, "o", True)  # type: ignore[attr-defined]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0", "huge pages are no part of plain torch"


def test_bench_kernels_lists_what_there_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "kernels", "--list", "--device", "cpu") == 0
    out = capsys.readouterr().out
    for words in ("rms_norm", "T H", "reference, compile", "T tokens", "documents"):
        assert words in out


def test_doctor_shows_each_implementation_and_why(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("  cross_entropy "))
    assert lines[at].split() in (["cross_entropy", "native", "in", "use", "by", "preference"],
                                 ["cross_entropy", "native", "not", "here", "(2)"])  # fmt: skip
    *said, note = lines[at + 1].split(";")[0].split()
    assert said == ["triton", "not", "here"]
    words = " ".join(lines[at + 1 : at + 5]).split()
    assert " ".join(words).count("not yet run on a GPU") == 2  # an older form of the first has; nothing of the second
    assert words.index("triton") < words.index("cuda") < words.index("reference")
    assert any(line.startswith(f"  {note} ") and "riton" in line for line in lines)
    assert any("cpu profile" in line and "off: MEGAPRE_KERNEL_PROFILE=off" in line for line in lines)


def test_doctor_reports_every_section(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    out = capsys.readouterr().out
    for word in ("Software", "torch", "CPU", "GPU", "Native code", "Kernels", "linear_cross_entropy", "Disk"):
        assert word in out


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), AssertionError("a bug")])
def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    door(monkeypatch, megapre.train.loop, "run").side_effect = error  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "argv", ["megapre", "train", "debug"])
    with pytest.raises(type(error), match="a bug"):
        cli.main()


def test_ctrl_c_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    door(monkeypatch, megapre.train.loop, "run").side_effect = KeyboardInterrupt()  # type: ignore[attr-defined]
    assert run("train", "debug") == 130
    assert capsys.readouterr().err.strip() == "megapre: interrupted"


def mended(run: Run, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of arguments that exit with code 2 and print nothing else."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megapre: error: ")
    assert "Traceback" not in err
    return err


def test_all_problems_of_a_config_are_printed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    err = mended(run, capsys, "train", "debug", "optim.lrr=1", "model.layers=0", "batch.micro=3")
    assert "debug.toml: 3 problems" in err
    assert "did you mean optim.lr?" in err
    assert err.count("\n  - ") == 3


def test_a_missing_kernel_and_a_full_disk_are_the_users(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megapre.kernels import KernelUnavailable

    loop = door(monkeypatch, megapre.train.loop, "run")
    loop.side_effect = KernelUnavailable("no such kernel")  # type: ignore[attr-defined]
    assert mended(run, capsys, "train", "debug") == "megapre: error: no such kernel\n"
    loop.side_effect = OSError(28, "No space left on device", "runs/x/a.bin")  # type: ignore[attr-defined]
    assert mended(run, capsys, "train", "debug") == "megapre: error: runs/x/a.bin: No space left on device\n"
    loop.side_effect = ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")  # type: ignore[attr-defined]
    assert "the Python package 'pyarrow' is missing" in mended(run, capsys, "train", "debug")


def test_the_traceback_is_there_when_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAPRE_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["megapre", "train", "nothing"])
    with pytest.raises(ValueError, match="no such file"):
        cli.main()


def test_wrong_options_exit_with_2(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["train"],
        ["trian", "debug"],
        ["sample", "x", "--top-p", "0"],
        ["bench", "step", "debug", "--steps", "0"],
    ):
        assert run(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Error: " in err


HELP = """
import sys
sys.argv = ["megapre", *sys.argv[1:]]
before = set(sys.modules)
from megapre.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
import json
standard = set(sys.stdlib_module_names)
tops = {name.split(".")[0] for name in set(sys.modules) - before}
print("\\n" + json.dumps(sorted(tops - standard)))
"""


@pytest.mark.parametrize(
    ("arguments", "packages"),
    [
        (["--help"], {"click", "megapre"}),
        (["--version"], {"click", "megapre"}),
        (["bench", "--help"], {"click", "megapre"}),
        (["sample", "--help"], {"click", "megapre"}),
    ],
)
def test_help_imports_click_and_nothing_else(arguments: list[str], packages: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) == packages


def test_help_of_train_lists_every_knob_and_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP, "train", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torch" not in json.loads(done.stdout.splitlines()[-1])
    for text in ("optim.lr ", "model.rope_scaling.factor", "gpt2-124m, ", "--print-config", "--resume"):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 100


def test_a_closed_pipe_is_no_bug() -> None:
    command = f"{sys.executable} -m megapre train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert "Usage" in done.stdout
    assert done.stderr == ""


ROOT = Path(os.path.realpath(cli.__file__)).parents[2]


def test_bench_comm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = door(monkeypatch, megapre.observe.bench_comm, "run", 1)
    assert run("bench", "comm") == 1
    request = megapre.observe.bench_comm.Request()
    bench.assert_called_once_with(request, load("debug").layout, None, False, "", None)  # type: ignore[attr-defined]
    options = "--axis tp,pp --collective all_reduce --from 4KiB --to 1GiB --factor 4 --repeats 9 --device cpu --out o"
    words = ["debug", "layout.tp=2", *options.split(), "--write-profile", "--profile", "p"]
    assert run("bench", "comm", *words) == 1
    request = megapre.observe.bench_comm.Request(
        ("tp", "pp"), ("all_reduce",), smallest=2**12, largest=2**30, factor=4, repeats=9, device="cpu"
    )
    cfg = load("debug", ["layout.tp=2"])
    bench.assert_called_with(request, cfg.layout, "o", True, "p", cfg.comm)  # type: ignore[attr-defined]


def test_tune_comm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = door(monkeypatch, megapre.observe.tune_comm, "run", 0)
    assert run("tune", "comm", "debug", "layout.tp=2") == 0
    cfg = load("debug", ["layout.tp=2"])
    tune.assert_called_once_with(cfg, megapre.observe.tune_comm.Request(), None, "")  # type: ignore[attr-defined]
    options = "--only buckets --margin 5 --error 10 --rounds 9 --budget 3 --out o --profile p"
    assert run("tune", "comm", "debug", "layout.tp=2", *options.split()) == 0
    request = megapre.observe.tune_comm.Request(("buckets",), 0.05, 0.1, 9, 3.0)
    tune.assert_called_with(cfg, request, "o", "p")  # type: ignore[attr-defined]


def test_launch_passes_another_verb_with_all_its_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = door(monkeypatch, megapre.launch.local, "run_verb", 75)
    assert run("launch", "local", "--grace", "7", "--nproc", "3", "tune", "comm", "debug", "--rounds", "2") == 75
    launch.assert_called_once_with(["tune", "comm", "debug", "--rounds", "2"], 3, 7.0)  # type: ignore[attr-defined]
    assert run("launch", "local", "bench", "comm", "--axis", "tp") == 2
    launch.assert_called_once()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rank", "told"), [("0", "megapre: error: rank 1: no file\n"), ("1", "")])
def test_an_error_that_all_ranks_have_is_told_by_the_first(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, told: str
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(
        megapre.train.loop, "run", create_autospec(megapre.train.loop.run, side_effect=RanksError("rank 1: no file"))
    )
    assert run("train", "debug") == 2
    assert capsys.readouterr().err == told


def test_what_help_says_of_a_verb_is_whole() -> None:
    groups: list[tuple[click.Group, click.Context]] = [(cli.cli, click.Context(cli.cli, info_name="megapre"))]
    for group, context in groups:
        shown = group.get_help(context).partition("Commands:")[2].splitlines()
        assert shown and not [line for line in shown if line.endswith("...")]
        inside = [(verb, click.Context(verb, context)) for verb in group.commands.values()]
        groups += [(verb, of) for verb, of in inside if isinstance(verb, click.Group)]
    assert len(groups) >= 6
