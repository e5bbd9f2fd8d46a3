"""Schedules in files."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapre.schedule import BUILDERS, ScheduleError, build, check, files, named, placement_of, read, write

BY_HAND = """\
# one forward, one backward
chunks: 1
micro-batches: 2

rank 1: F0.0 B0.0   # the last
  F1.0 B1.0
rank 0 : F0.0 F1.0 B0.0 B1.0
"""


def test_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(BY_HAND)
    schedule = read(path)
    assert (schedule.name, schedule.placement) == ("mine", "loop")
    assert check(schedule) == []
    assert schedule.programs == build("1f1b", 2, 1, 2).programs


@settings(max_examples=30)
@given(name=st.sampled_from(list(BUILDERS)), ranks=st.integers(1, 4), micro_batches=st.integers(8, 40))
def test_what_is_written_is_read(name: str, ranks: int, micro_batches: int) -> None:
    schedule = build(name, ranks, BUILDERS[name].least, micro_batches)
    text = files.as_text(schedule)
    assert files.from_text(text) == schedule
    assert max(map(len, text.splitlines())) <= files.WIDTH


def test_write_and_read(tmp_path: Path) -> None:
    schedule = build("zbv", 3, 2, 6)
    write(schedule, tmp_path / "zbv.txt")
    assert read(tmp_path / "zbv.txt") == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank 0: F0.0", "s: no line 'chunks: NUMBER'"),
        ("chunks: 1\nmicro-batches: 1", "s: no line 'rank 0: ACTIONS'"),
        ("chunks: one\nmicro-batches: 1\nrank 0: F0.0", "s, line 1: chunks = 'one' is not a whole number"),
        ("chunks: 1\nmicro-batches: 1\nrank 0: F0.0\nrank 2: F0.0", "there is a rank 2, but no line 'rank 1: ACTIONS'"),
        ("chunks: 1\nmicro-batches: 1\nrank 0: F0.0 G0.0", "s, line 3: 'G0.0' is no action; .*chunk: F3.1"),
        ("chunks: 1\nchunks: 2", "line 2: 'chunks' was given on line 1 already"),
        ("lanes: 1", "line 1: 'lanes: 1' is none of KEY: VALUE with the keys name, chunks"),
        ("chunks: 1\nmicro-batches: 1\nplacement: w\nrank 0: F0.0", "line 3: placement 'w' is none of loop, v"),
    ],
)
def test_what_cannot_be_read_names_its_line(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        files.from_text(text, "s")


def test_an_incomplete_file_is_read_and_found_out() -> None:
    schedule = files.from_text(BY_HAND.replace("B1.0\nrank 0", "\nrank 0"))
    assert check(schedule) == ["rank 1: B1.0 is missing"]


def test_a_file_stands_for_a_name(tmp_path: Path) -> None:
    path = str(tmp_path / "mine.txt")
    write(build("zbv", 3, 2, 7), path)
    assert named(path, 3, 2, 7) == build("zbv", 3, 2, 7)
    assert (placement_of(path), placement_of("zbv"), placement_of("1f1b")) == ("v", "v", "loop")
    assert named("interleaved", 2, 2, 4, group=4) == build("interleaved", 2, 2, 4, group=4)


def test_a_file_for_other_sizes_or_that_cannot_run_is_refused_in_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(BY_HAND)
    with pytest.raises(ScheduleError) as caught:
        named(str(path), 4, 1, 8)
    assert str(caught.value) == (
        f"schedule {path}: is for 2 ranks, but layout.pp = 4; for 2 micro-batches, but batch.global / (batch.micro * "
        f"dp) = 8; nearest: layout.pp=2 layout.vpp=1 and 2 micro-batches a step, or another file"
    )
    path.write_text(BY_HAND.replace("F1.0 B1.0\nrank 0", "F1.0\nrank 0"))
    with pytest.raises(ScheduleError, match=r"schedule 'mine' cannot run:\n  - rank 1: B1.0 is missing"):
        named(str(path), 2, 1, 2)
    with pytest.raises(ScheduleError, match=r"schedule nowhere/none.txt: No such file or directory"):
        named("nowhere/none.txt", 2, 1, 2)
    path.write_bytes(b"chunks: \xff")
    with pytest.raises(ScheduleError, match=r"mine.txt: byte 8 is not UTF-8 text"):
        placement_of(str(path))
