"""Timelines as text, picture and trace."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapre.schedule import BUILDERS, Costs, Timeline, build, simulate
from megapre.schedule.draw import draw, summary
from megapre.schedule.trace import trace, write_trace


def timeline(name: str, ranks: int, chunks: int, micro_batches: int, **costs: float) -> Timeline:
    return simulate(build(name, ranks, chunks, micro_batches), Costs.of(ranks * chunks, **costs))


def test_1f1b_as_text() -> None:
    assert draw(timeline("1f1b", 2, 1, 2), width=24).splitlines() == [
        "rank 0  FF..B-.B-",
        "        01  0  1",
        "",
        "rank 1  .FB-FB-..",
        "         00 11",
        "",
        "F forward, B backward, .",
        "idle; below, the micro-",
        "batch; a column is 1",
    ]


def test_chunks_are_small_letters_or_a_line() -> None:
    two = draw(timeline("zbv", 1, 2, 1), width=30).splitlines()
    assert two[:2] == ["rank 0  F--f--i--w--I--W--", "        0  0  0  0  0  0"]
    three = draw(timeline("gpipe", 1, 3, 1), width=18).splitlines()
    assert three[:3] == ["rank 0  FFFB-B-B-", "        0000 0 0", "        0122 1 0"]


def test_what_is_too_long_is_sampled() -> None:
    lines = draw(timeline("gpipe", 2, 1, 64), width=60).splitlines()
    assert re.fullmatch(r"rank 0  F+\.*B+\.*", lines[0]) and len(lines[0]) == 60
    assert lines[1].startswith("rank 1")


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(BUILDERS)),
    ranks=st.integers(1, 6),
    micro_batches=st.integers(12, 40),
    width=st.integers(20, 160),
    forward=st.floats(0.1, 3),
)
def test_nothing_is_wider_than_asked(name: str, ranks: int, micro_batches: int, width: int, forward: float) -> None:
    found = timeline(name, ranks, BUILDERS[name].least, micro_batches, forward=forward, latency=0.3)
    lines = draw(found, width).splitlines()
    assert sum(line.startswith("rank") for line in lines) == ranks and max(map(len, lines)) <= width
    painted = [line for line in draw(found, width, colour=True).splitlines() if line.startswith("rank")]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in painted]
    assert len(plain) == ranks and max(map(len, plain)) <= width


def test_summary() -> None:
    assert summary(timeline("interleaved", 4, 2, 8)) == (
        "interleaved: 4 ranks x 2 chunks, 8 micro-batches: takes 57, bubble 18.8%, idle 15.8%, at most 11 activations "
        "in flight (5.5 micro-batches' worth)"
    )
    assert summary(timeline("1f1b", 1, 1, 1)).startswith("1f1b: 1 rank, 1 micro-batch: takes 3, bubble 0.0%")
    assert draw(timeline("1f1b", 1, 1, 1, forward=0, input=0, weights=0)) == "nothing takes time"


def test_trace_has_every_action_at_its_time(tmp_path: Path) -> None:
    found = timeline("zbv", 2, 2, 4)
    write_trace(found, tmp_path / "trace.json", unit=10.0)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert events == trace(found, unit=10.0)
    done = [event for event in events if event["ph"] == "X"]
    assert len(done) == sum(map(len, found.schedule))
    first = next(event for event in done if event["tid"] == 1)
    assert (first["name"], first["ts"], first["dur"], first["args"]["stage"]) == ("F0.0", 10.0, 10.0, 1)
    held = [event for event in events if event["ph"] == "C" and event["name"] == "in flight, rank 0"]
    assert max(event["args"]["activations"] for event in held) == found.in_flight[0]
    assert held[-1]["args"]["activations"] == 0


def test_picture_has_a_row_for_each_rank(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from megapre.schedule.picture import write_picture

    write_picture({"": timeline("dualpipev", 2, 2, 5)}, tmp_path / "a.png")
    write_picture({"": timeline("gpipe", 6, 1, 40)}, tmp_path / "b.png", unit="ms")
    sizes = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    heights = [int.from_bytes(data[20:24]) for data in sizes]
    assert all(data.startswith(b"\x89PNG") for data in sizes) and heights[1] > heights[0]
