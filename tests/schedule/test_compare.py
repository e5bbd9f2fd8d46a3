"""All schedules side by side."""

import pytest

from megapre.schedule import BUILDERS, Costs, ScheduleError
from megapre.schedule.compare import Row, best, compare


def rows(ranks: int, micro_batches: int, chunks: tuple[int, ...]) -> list[Row]:
    return compare(ranks, micro_batches, chunks, lambda plan: Costs.of(plan.stages, *[1 / plan.chunks] * 3))


def test_each_schedule_has_a_row_for_the_chunks_it_can_have() -> None:
    found = rows(8, 32, (2, 4))
    assert [(row.name, row.chunks) for row in found] == [
        ("gpipe", 1),
        ("1f1b", 1),
        ("interleaved", 2),
        ("interleaved", 4),
        ("breadth_first", 2),
        ("breadth_first", 4),
        ("zb_h1", 1),
        ("zbv", 2),
        ("dualpipev", 2),
    ]
    assert {row.name for row in found} == set(BUILDERS)
    bubbles = [row.timeline.bubble for row in found if row.timeline]
    assert bubbles == pytest.approx([7 / 32, 7 / 32, 7 / 64, 7 / 128, 7 / 64, 7 / 128, 7 / 96, 7 / 192, 7 / 192])
    assert [row.in_flight for row in found] == [32, 8, 11.5, 9.75, 32, 32, 8, 8, 8.5]
    assert [row.messages for row in found] == [64, 64, 128, 256, 128, 256, 64, 128, 128]


def test_the_best_is_the_quickest_within_the_limits() -> None:
    found = rows(8, 32, (2,))
    assert best(found).name == "zbv"  # as quick as dualpipev, and holds less
    assert best([row for row in found if row.name != "zbv"], in_flight=8).name == "zb_h1"
    weighed = [Row(row.name, row.chunks, row.timeline, 1000 * row.in_flight) for row in found]
    assert best(weighed, memory=7999 + 1).name == "zbv"
    with pytest.raises(ScheduleError, match="no schedule is within 7,000 bytes; the least is 1f1b with 8,000 bytes"):
        best(weighed, memory=7000)
    with pytest.raises(ScheduleError, match="within 3 micro-batches in flight; the least is 1f1b with 8"):
        best(found, in_flight=3)


def test_what_cannot_be_built_says_why() -> None:
    found = {row.name: row for row in rows(4, 6, (2,))}
    assert found["dualpipev"].timeline is None
    assert found["dualpipev"].refused.startswith("'dualpipev' needs a micro-batch for each of its stages, 2*ranks")
    assert found["dualpipev"].in_flight == found["dualpipev"].messages == 0
    with pytest.raises(ScheduleError, match="no schedule can be built"):
        best([found["dualpipev"]])
