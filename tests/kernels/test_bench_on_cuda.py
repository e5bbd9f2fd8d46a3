"""The timer's CUDA side on a device made up of a clock: what runs there runs after what was enqueued before it."""

import time

import pytest
import torch

from megapre.kernels.bench import timer


class Stream:
    """A stream whose clock counts seconds; `_sleep` and works move it on."""

    def __init__(self) -> None:
        self.at, self.slept = 0.0, []

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles / timer.CYCLES_PER_S)
        self.at = max(self.at, time.perf_counter()) + self.slept[-1]

    def run(self, seconds: float) -> None:
        self.at = max(self.at, time.perf_counter()) + seconds


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    made = Stream()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = made.at = max(made.at, time.perf_counter())

        def synchronize(self) -> None:
            time.sleep(max(made.at - time.perf_counter(), 0.0))

        def elapsed_time(self, other: "Event") -> float:
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(max(made.at - time.perf_counter(), 0.0)))
    return made


def of_cuda() -> timer.Timer:
    made = timer.Timer("cpu", cold=False)
    made.device = "cuda"
    return made


def test_what_the_host_takes_is_not_in_a_time_but_in_the_wall(stream: Stream) -> None:
    """A call that needs 8 ms of the host and 2 of the device: 2 ms, once the host is known; 8 or more by the wall."""
    clock = of_cuda()

    def work() -> None:
        time.sleep(0.008)
        stream.run(0.002)

    first, *rest = clock.turns({"work": (work, None)}, 4)["work"]
    assert first > 4, "nothing was known yet: the host is in it"
    assert all(found == pytest.approx(2, abs=0.01) for found in rest)
    assert clock.wall(work, 3) >= 8


def test_a_call_that_compiles_or_waits_does_not_put_the_next_off(stream: Stream) -> None:
    clock = of_cuda()
    takes = iter([0.3, 0.0, 0.0])

    def work() -> None:
        time.sleep(next(takes))
        torch.cuda.synchronize()  # as an operation that asks the device
        stream.run(0.001)

    clock.turns({"work": (work, None)}, 3)
    assert stream.slept[0] < 0.002 and stream.slept[1] == timer.MOST_AHEAD_S
    assert max(stream.slept) <= timer.MOST_AHEAD_S


def test_a_timer_keeps_no_work_alive(stream: Stream) -> None:
    clock = of_cuda()
    clock.milliseconds(lambda: stream.run(0.001))
    assert not len(clock._enqueued)
