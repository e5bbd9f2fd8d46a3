"""A run on several ranks: the same run as on one, in one folder, stopped and resumed together."""

import errno
import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, RunOn

from megapre import checkpoint
from megapre.checkpoint.commit import committed
from megapre.config import Config
from megapre.data import DataError
from megapre.errors import UserError
from megapre.parallel.comm import Group, Place
from megapre.train import bench, loop, tracing
from megapre.train.folder import read_metrics
from megapre.train.step import Engine, StepResult, connected

Tiny = Callable[..., Config]
CPU = torch.device("cpu")


def here() -> Place:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Place(rank, world, rank, world)


def train(cfg: Config, resume: bool = False) -> int:
    """What `loop.run` does once the ranks have joined."""
    return loop._run(cfg, resume, here(), CPU)


def curve(run: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run) if "loss" in r]


def same(curve: list[tuple[int, float, float]], other: list[tuple[int, float, float]]) -> bool:
    return [step for step, *_ in curve] == [step for step, *_ in other] and all(
        a == pytest.approx(b, rel=1e-5) for a, b in zip(curve, other, strict=True)
    )


@pytest.fixture
def alone(tiny: Tiny, tmp_path: Path) -> list[tuple[int, float, float]]:
    """The curve of the same run on one rank."""
    assert loop.run(tiny("name=alone", "run.eval_every=6", "run.eval_batches=1")) == 0
    return curve(tmp_path / "alone")


EVAL = ("run.eval_every=6", "run.eval_batches=1")


def test_eight_ranks_train_as_one_does(
    run_on: RunOn, tiny: Tiny, tmp_path: Path, alone: list[tuple[int, float, float]]
) -> None:
    cfg = tiny("layout.tp=2", "layout.pp=2", "layout.dp=2", "batch.micro=1", *EVAL)
    assert run_on(8, train, cfg) == [0] * 8
    run = tmp_path / "run"
    assert same(curve(run), alone)
    valid = [[r["valid_loss"] for r in read_metrics(tmp_path / name) if "valid_loss" in r] for name in ("run", "alone")]
    assert valid[0] == pytest.approx(valid[1], rel=1e-5) and len(valid[0]) == 2
    assert {log.name for log in (run / "logs").iterdir()} == {f"rank{rank}.log" for rank in range(8)}
    logs = [(run / "logs" / f"rank{rank}.log").read_text() for rank in range(8)]
    assert all(log.count("\nstep ") == 12 for log in logs)  # each with its own time and memory
    assert "8 ranks = pp 2 x dp 2 x cp 1 x tp 2" in logs[0]
    assert {path.name for path in run.iterdir()} >= {"config.toml", "plan.json", "summary.json", "metrics.jsonl"}


@pytest.mark.parametrize(("layout", "ranks"), [(("layout.tp=2", "layout.pp=2"), 4), (("layout.dp=2",), 2)])
def test_a_run_goes_on_under_another_layout(
    run_on: RunOn,
    tiny: Tiny,
    tmp_path: Path,
    alone: list[tuple[int, float, float]],
    layout: tuple[str, ...],
    ranks: int,
) -> None:
    half = ("checkpoint.every=5", "batch.micro=1", "checkpoint.keep=9")
    assert run_on(2, stopped_after, 7, tiny("layout.pp=2", *half)) == [75, 75]
    assert committed(tmp_path / "run" / "checkpoints")[0].name == "step_00000007"
    assert run_on(ranks, train, tiny(*layout, *half), True) == [0] * ranks
    assert same(curve(tmp_path / "run"), alone)


def stopped_after(last: int, cfg: Config, asked: int = 1) -> int:
    """Trains; rank `asked` alone gets SIGTERM in the step before `last`, the first that begins with it asked."""
    step, count = Engine.step, 0

    def counting(self: Engine, *args: Any, **options: Any) -> StepResult:
        nonlocal count
        count += 1
        result = step(self, *args, **options)
        if count == last - 1 and dist.get_rank() == asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", counting)
        return train(cfg)


def test_one_rank_that_is_asked_stops_all_after_the_same_step(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    assert run_on(4, stopped_after, 6, tiny("layout.dp=2", "layout.tp=2", "batch.micro=1"), 3) == [75] * 4
    assert len(curve(tmp_path / "run")) == 6
    manifest = checkpoint.newest_verified(tmp_path / "run" / "checkpoints")
    assert manifest is not None and manifest.step == 6


def diverging(cfg: Config) -> int:
    """Trains; from step 4 on a gradient of the last rank is not finite."""
    finish, count = Engine.step, 0

    def spoiled(self: Engine, *args: Any, **options: Any) -> StepResult:
        nonlocal count
        count += 1
        if count >= 4 and dist.get_rank() == dist.get_world_size() - 1:
            self.feed.per_token = torch.full((), float("nan"))
        return finish(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", spoiled)
        patch.setattr("megapre.train.stage.torch.reciprocal", lambda *_, **__: None)
        return train(cfg)


def test_ranks_agree_that_a_run_has_diverged(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    assert run_on(2, diverging, tiny("layout.dp=2", "batch.micro=1")) == [1, 1]
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "5 steps in a row, 4 to 8" in log
    manifest = checkpoint.newest_verified(tmp_path / "run" / "checkpoints")
    assert manifest is not None and manifest.step == 8


def test_a_used_folder_is_refused_on_every_rank(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    with pytest.raises(RankError, match="exists already; continue that run with --resume"):
        run_on(2, train, tiny("layout.dp=2", "batch.micro=1"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]


def test_ranks_leave_a_finished_run_as_it_is(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    cfg = tiny("layout.dp=2", "batch.micro=1", "run.steps=2")
    assert run_on(2, train, cfg) == [0, 0]
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    assert run_on(2, train, cfg, True) == [0, 0]
    assert (tmp_path / "run" / "summary.json").read_bytes() == summary
    assert "nothing to do: the run is at step 2 of 2" in (tmp_path / "run" / "logs" / "rank0.log").read_text()


def without_memory(cfg: Config, rank: int) -> str:
    """What a rank is told where one of them is on a machine without memory."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr("megapre.train.machine.memory_size", lambda _: 1000)
        try:
            train(cfg)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_machine_that_is_too_small_is_told_to_all(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    first, second = run_on(2, without_memory, tiny("layout.dp=2", "batch.micro=1"), 1)
    assert first == second and first.startswith("RanksError: rank 1: model: ")
    assert not (tmp_path / "run").exists()


def refused(cfg: Config, where: str, texts: dict[int, str]) -> str:
    """What a rank is told where `texts` are refusals of some of the ranks alone."""
    own = texts.get(dist.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        if own is not None:
            patch.setattr(loop, where, create_autospec(getattr(loop, where), side_effect=DataError(own)))
        try:
            train(cfg)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("where", ["settle", "plan_of", "build_loader"])
@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({1: "x.bin is not there"}, "rank 1: x.bin is not there"),
        ({0: "x.bin is not there"}, "rank 0: x.bin is not there"),
        ({rank: "x.bin is not there" for rank in range(3)}, "ranks 0-2: x.bin is not there"),
        ({0: "no x", 1: "no y", 2: "no x"}, "ranks 0, 2: no x\nrank 1: no y"),
    ],
)
def test_what_some_ranks_refuse_is_told_once_with_their_numbers(
    run_on: RunOn, tiny: Tiny, tmp_path: Path, where: str, texts: dict[int, str], told: str
) -> None:
    cfg = tiny("layout.dp=3", "batch.micro=1", "batch.global=6")
    assert run_on(3, refused, cfg, where, texts) == [f"RanksError: {told}"] * 3
    assert not (tmp_path / "run").exists()


def without_room(cfg: Config) -> str:
    """What a rank is told where the first one cannot write the run folder."""
    with pytest.MonkeyPatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device", "config.toml")
        patch.setattr(loop.RunFolder, "write_json", create_autospec(loop.RunFolder.write_json, side_effect=full))
        try:
            train(cfg)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_full_disk_is_told_to_all(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    first, second = run_on(2, without_room, tiny("layout.dp=2", "batch.micro=1"))
    assert first == second == "RanksError: rank 0: [Errno 28] No space left on device: 'config.toml'"
    assert not (tmp_path / "run").exists()


def damaged(cfg: Config) -> list[str]:
    """What each rank is told while the newest checkpoint is looked for."""
    told: list[str] = []
    manifest = checkpoint.newest_verified(Path(cfg.run.dir) / "run" / "checkpoints", told.append, dist.group.WORLD)
    return [*told, "none" if manifest is None else str(manifest.step)]


def test_all_ranks_pass_over_a_damaged_checkpoint(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    cfg = tiny("layout.dp=2", "batch.micro=1", "checkpoint.every=6")
    assert run_on(2, train, cfg) == [0, 0]
    newest, older = committed(tmp_path / "run" / "checkpoints")
    for victim in newest.glob("*.distcp"):  # each is in the share of one rank alone
        whole = victim.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
        for told, step in run_on(2, damaged, cfg):
            assert victim.name in told and "damaged" in told and step == "6"
        victim.write_bytes(whole)
    assert older.name == "step_00000006"


def traced(cfg: Config) -> tuple[int, list[int]]:
    """Trains; and how many ranks agreed on time zero in each traced step."""
    agreed = []

    class Noted(loop.Trace):
        def __init__(self, group: Group, device: torch.device) -> None:
            agreed.append(group.size)
            super().__init__(group, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trace", Noted)
        return train(cfg), agreed


def test_chosen_steps_are_traced(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    cfg = tiny("layout.pp=2", "layout.dp=2", "batch.micro=1", "run.trace=[2,4]", "run.steps=4")
    assert run_on(4, traced, cfg) == [(0, [4, 4])] * 4
    traces = tmp_path / "run" / "traces"
    assert {path.name for path in traces.iterdir()} == {
        f"step_0000000{step}.{ending}" for step in (2, 4) for ending in ("json", "png")
    }
    events = json.loads((traces / "step_00000004.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert list(names.values()) == [
        "1f1b, measured, ranks 0, 2",
        "1f1b, measured, ranks 1, 3",
        "1f1b, simulated with the times of the first",
    ]
    for pipeline in (0, 1):
        for rank in (0, 1):
            spans = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (pipeline, rank)]
            ends = [event["ts"] + event["dur"] for event in spans]
            assert all(end <= event["ts"] + 1e-3 for end, event in zip(ends, spans[1:], strict=False))
            assert sum(event["cat"] in ("forward", "backward") for event in spans) == 2 * cfg.batch.micro_batches(2)
            assert [event["name"] for event in spans if event["cat"] == "end of the step"] == [
                "sum of gradients",
                "norm and loss",
                "update",
                "parameters handed round",
            ]
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert log.count("traced step") == 2 and (traces / "step_00000002.png").read_bytes().startswith(b"\x89PNG")


def without_pictures(cfg: Config) -> int:
    """Trains where nothing can be drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tracing, "write_picture", create_autospec(tracing.write_picture, side_effect=ValueError("no font"))
        )
        return train(cfg)


def test_a_trace_that_fails_ends_no_run(run_on: RunOn, tiny: Tiny, tmp_path: Path) -> None:
    cfg = tiny("layout.dp=2", "batch.micro=1", "run.trace=[1]", "run.steps=3")
    assert run_on(2, without_pictures, cfg) == [0, 0]
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "the trace of step 1 could not be written: no font" in log
    assert [step for step, *_ in curve(tmp_path / "run")] == [1, 2, 3]


def on_its_way(cfg: Config) -> list[tuple[int, int]]:
    """Buckets of parameters that are still handed round when each of two steps begins its actions, and at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megapre.train.stage.torch.compile", lambda function, **_: function)
        engine = Engine(cfg, CPU, connected(cfg, here(), CPU))
    exchange, found = engine.flat.exchange, []
    assert exchange is not None
    with closing(bench.made_up(cfg, dist.get_rank(), 2)) as batches:
        for _ in range(2):
            run = engine.executor.run
            began: list[int] = []
            engine.executor.run = lambda trace, run=run, began=began: began.append(len(exchange.gathers)) or run(trace)
            engine.step(next(batches), 1e-3)
            engine.executor.run = run
            found.append((began[0], len(exchange.gathers)))
    engine.settle()
    return found


def test_a_compiled_step_waits_for_all_parameters_first(run_on: RunOn, tiny: Tiny) -> None:
    """Nothing tells it, layer by layer, which it will read next."""
    cfg = tiny("layout.dp=2", "batch.micro=1", "run.compile=true", "model.vocab=200")
    for first, second in run_on(2, on_its_way, cfg):
        assert first[0] == second[0] == 0 and first[1] == second[1] > 0


def timed(cfg: Config) -> dict[str, Any]:
    return bench._step(cfg, 2, 1, here(), CPU)


def test_the_step_of_several_ranks_is_timed(run_on: RunOn, tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = tiny("layout.pp=2", "batch.micro=1", "data.train=[]", "model.vocab=200")
    first, second = run_on(2, timed, cfg)
    assert first["world"] == 2 and first["layout"]["pp"] == 2
    assert first["step_s"] == second["step_s"] and first["last_loss"] == second["last_loss"]
