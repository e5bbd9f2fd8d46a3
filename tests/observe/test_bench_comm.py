"""`megapre bench comm`: a link of known latency and bandwidth is found, requests are checked, files tell the same."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import torch.distributed as dist
from fake_link import FakeLink
from ranks import RunOn

from megapre.config import Comm, Layout, Run, load
from megapre.mesh import Mesh
from megapre.observe import bench_comm, comm_report
from megapre.observe.bench_comm import Report, Request, checked, layout_of, parse_size, row
from megapre.observe.comm_ranks import BenchCommError, Ranks, on_ranks
from megapre.parallel import collectives, comm
from megapre.parallel.comm import CommError, Place, connect
from megapre.plan import Link
from megapre.plan.comm_profile import find
from megapre.plan.link import FACTORS

CPU = torch.device("cpu")
LINK = Link(1e-5, 2e9)  # half of the ladder below latency * bandwidth = 20 kB, half above


def ranks_with(watch: Any, **sizes: int) -> Ranks:
    world, rank = dist.get_world_size(), dist.get_rank()
    return Ranks(Place(rank, world, rank, world), CPU, connect(Mesh(world, **sizes), rank, CPU), watch)


def fake_run(folder: str) -> tuple[int, str]:
    """The whole command on real ranks, sizes up to 1 MiB, but for the clock."""
    request = Request(smallest=1 << 10, largest=1 << 20)
    with redirect_stdout(io.StringIO()) as said:
        code = bench_comm._run(request, ranks_with(FakeLink(LINK), tp=2), f"{folder}/out", True, f"{folder}/p.json")
    return code, said.getvalue()


def test_a_known_link_comes_back_within_2_per_cent_for_every_collective_and_axis(run_on: RunOn, tmp_path: Path) -> None:
    results = run_on(4, fake_run, str(tmp_path))
    assert [code for code, _ in results] == [0, 0, 0, 0]
    assert [bool(said) for _, said in results] == [True, False, False, False]
    profile, why = find(
        tmp_path / "p.json", {"device": "cpu", "nodes": 1, "ranks_per_node": 4, "tp": 2, "dp": 2}, "links"
    )
    assert profile is not None, why
    assert set(profile.links) == {"tp", "dp", "world"}
    for links in profile.links.values():
        assert set(links) == set(FACTORS)
        for link in links.values():
            assert link.latency == pytest.approx(LINK.latency, rel=0.02)
            assert link.bandwidth == pytest.approx(LINK.bandwidth, rel=0.02)
            assert sorted(link.times) == [1 << n for n in range(10, 21)]
    (written,) = (tmp_path / "out").glob("comm_*.json")
    content = json.loads(written.read_text())
    assert {entry["wrong"] for entry in content["rows"]} == {""} and len(content["rows"]) == 3 * len(FACTORS) * 11
    table = written.with_suffix(".md").read_text()
    assert table.count("\n| tp | 2 | all_reduce |") == 11 and "latency 1" in table
    assert "all_reduce  tp of 2 ranks" in results[0][1] and "profile written to" in results[0][1]


def test_wrong_numbers_fail_the_run_and_write_no_profile(run_on: RunOn, tmp_path: Path) -> None:
    results = run_on(2, broken_run, str(tmp_path))
    assert [code for code, _ in results] == [1, 1]
    assert "results were wrong; no profile is written" in results[0][1] and "numbers are wrong" in results[0][1]
    assert not (tmp_path / "p.json").exists()


def broken_run(folder: str) -> tuple[int, str]:
    real = collectives.Call.check
    if dist.get_rank() == 1:
        collectives.Call.check = lambda call: real(call) or "3 of 256 numbers are wrong"  # type: ignore[method-assign]
    watch = FakeLink(LINK)
    watch.most = _most  # type: ignore[method-assign]
    try:
        with redirect_stdout(io.StringIO()) as said:
            request = Request(collectives=("all_gather",), largest=1 << 14)
            code = bench_comm._run(request, ranks_with(watch), None, True, f"{folder}/p.json")
        return code, said.getvalue()
    finally:
        collectives.Call.check = real  # type: ignore[method-assign]


def _most(number: float) -> float:
    token = torch.tensor(number)
    dist.all_reduce(token, op=dist.ReduceOp.MAX)
    return token.item()


def asked(request: Request, **sizes: int) -> list[tuple[str, str]]:
    return bench_comm.cases(request, ranks_with(FakeLink(LINK), **sizes))


def test_by_default_a_pipeline_sends_and_all_others_do_everything(run_on: RunOn) -> None:
    pipeline = [("pp", "send_recv"), ("pp", "broadcast")]
    assert run_on(2, asked, Request())[0] == [("dp", name) for name in FACTORS]
    assert run_on(2, asked_pipeline)[0] == pipeline


def asked_pipeline() -> list[tuple[str, str]]:
    with pytest.raises(BenchCommError, match="--axis tp has one rank in"):
        asked(Request(axes=("tp",)), pp=2)
    assert asked(Request(axes=("world",), collectives=("all_reduce",)), pp=2) == [("world", "all_reduce")]
    return asked(Request(), pp=2)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(axes=("ep",)), "no axis ep; there are tp, cp, dp, pp, world"),
        (Request(collectives=("all_reduce", "gossip")), "no collective gossip; there are all_reduce"),
        (Request(smallest=64, largest=32), "sizes from 64 to 32 bytes are none"),
        (Request(smallest=1), "from 4 bytes up"),
    ],
)
def test_requests_that_make_no_sense_are_refused(request_: Request, message: str) -> None:
    with pytest.raises(BenchCommError, match=message):
        checked(request_)


def test_sizes_and_layouts_in_words() -> None:
    assert [parse_size(text) for text in ("512", "4B", "64KiB", "16MiB", "1GiB")] == [
        512, 4, 2**16, 2**24, 2**30,
    ]  # fmt: skip
    for text in ("64KB", "", "-1", "1.5MiB", "MiB"):
        with pytest.raises(BenchCommError, match="is no size"):
            parse_size(text)
    assert layout_of("tp=2, pp=4", None) == Layout(tp=2, pp=4)
    assert layout_of("", load("debug", ["layout.tp=2"])).tp == 2
    with pytest.raises(BenchCommError, match="leave one out"):
        layout_of("tp=2", load("debug"))
    for text in ("tp", "tp=0", "ep=2"):
        with pytest.raises(BenchCommError, match="as in tp=2,pp=2"):
            layout_of(text, None)


def test_one_rank_is_told_how_to_start_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BenchCommError, match="megapre launch local --nproc 2 tune comm"):
        on_ranks("tune", Layout(), Run(steps=1, device="cpu"), Comm(), lambda ranks: 0)


def test_groups_are_made_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is measured is what a run will have."""
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "0202", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    join, made = create_autospec(comm.join), create_autospec(connect, side_effect=CommError("far enough"))
    monkeypatch.setattr(comm, "join", join)
    monkeypatch.setattr(comm, "connect", made)
    recipe = load("debug", ["comm.timeout=50", "comm.timeouts={dp=20}", "comm.nccl={dp={max_ctas=8}}"])
    with pytest.raises(CommError, match="far enough"):
        on_ranks("tune", Layout(), Run(steps=1, device="cpu"), recipe.comm, lambda ranks: 0)
    assert join.call_args.args[2] == 50
    options = made.call_args.kwargs["options"]
    assert (options["tp"].timeout, options["dp"].timeout, options["dp"].nccl) == (50, 20, {"max_ctas": 8})


def test_bandwidths_are_those_of_nccl_tests() -> None:
    found = row("tp", 8, "all_reduce", 8000, [2e-6, 1e-6, 1e-6, 1e-6, 4e-6])
    assert (found.p50, found.repeats) == (1e-6, 5)
    assert found.algorithm_bandwidth == pytest.approx(8e9) and found.bus_bandwidth == pytest.approx(14e9)  # 2 * 7 / 8
    assert {name: factor(4) for name, factor in FACTORS.items()} == {
        "all_reduce": 1.5,
        "reduce_scatter": 0.75,
        "all_gather": 0.75,
        "broadcast": 1.0,
        "all_to_all": 0.75,
        "send_recv": 1.0,
    }


def test_a_report_says_why_there_is_no_fit(tmp_path: Path) -> None:
    about = {"hardware": "CPU (R)", "nodes": 1, "ranks_per_node": 2, "date": "2026-11-21"}
    rows = [row("dp", 2, "broadcast", size, [1e-5] * 5) for size in (1024, 2048)]
    links = {("dp", "broadcast"): bench_comm.linked(rows)}
    report = Report(about, rows, links)
    assert report.by_axis() == {}
    json_file, _ = comm_report.write(report, str(tmp_path))
    content = json.loads(Path(json_file.removeprefix("written: ")).read_text())
    assert "2 sizes give no latency" in content["links"][0]["none"]
    assert (tmp_path / "comm_cpu-r_1x2_2026-11-21.md").exists()


def test_rates_and_latencies_are_plain_numbers() -> None:
    rates = (0.0, 3.14e5, 2.63e6, 2.34e7, 1.29e9, 4.21e10, 1.234e12)
    shown = ["0", "0.000314", "0.00263", "0.0234", "1.29", "42.1", "1,234"]
    assert [comm_report.gb(rate) for rate in rates] == shown
    assert comm_report.describe(Link(1.19e-3, 3e5)).startswith("latency 1,190 us, bus bandwidth 0.000300 GB/s;")
