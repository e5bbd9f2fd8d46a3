"""The timer's CUDA side on a device made up of a clock and a log (fake_cuda.py), and on a GPU where there is one."""

import subprocess
import sys
import time

import fake_cuda
import pytest
import torch

from megapre.kernels.bench import cases, cuda_timer
from megapre.kernels.bench.case import Case
from megapre.kernels.bench.run import Runner
from megapre.kernels.bench.timer import quantile

CALL = ["synchronize", "flush", "sleep", "record", "work", "record", "event.synchronize"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.Device:
    return fake_cuda.install(monkeypatch)


def test_a_call_is_timed_alone_after_the_cache_was_overwritten(
    gpu: fake_cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ahead in ("LEAST_AHEAD_S", "MOST_AHEAD_S"):
        monkeypatch.setattr(cuda_timer, ahead, 0.2)  # more than a busy machine keeps the host from its work
    clock = fake_cuda.timer(gpu)
    took = clock.milliseconds(lambda: gpu.run(0.002), lambda: gpu.run(0.003, "prepare"))
    assert gpu.log == ["prepare", *CALL] and took == pytest.approx(2, abs=0.01)


def test_what_the_host_takes_is_not_in_a_time_but_in_the_wall(gpu: fake_cuda.Device) -> None:
    """A call that needs 3 ms of the host and 2 of the device: the device comes first once, and the call is repeated."""
    clock = fake_cuda.timer(gpu)

    def work() -> None:
        time.sleep(0.003)
        gpu.run(0.002)

    times = clock.turns({"work": (work, None)}, 7)["work"]
    assert quantile(times, 0.5) == pytest.approx(2, abs=0.01), "what counts"
    assert gpu.slept[0] == cuda_timer.LEAST_AHEAD_S and gpu.slept[1] >= 0.006
    assert clock.wall(work) >= 3


def test_a_call_that_compiles_or_waits_does_not_put_the_next_off(gpu: fake_cuda.Device) -> None:
    clock = fake_cuda.timer(gpu)
    takes = iter([0.3, *[0.0] * 20])

    def work() -> None:
        time.sleep(next(takes))
        gpu.wait()
        gpu.run(0.001)

    clock.turns({"work": (work, None)}, 3)
    assert gpu.slept[0] < 0.002 and max(gpu.slept) <= cuda_timer.MOST_AHEAD_S
    assert len(gpu.slept) <= 3 * cuda_timer.ATTEMPTS


def test_a_timer_keeps_no_work_alive(gpu: fake_cuda.Device) -> None:
    clock = fake_cuda.timer(gpu)
    clock.milliseconds(lambda: gpu.run(0.001))
    assert not len(clock._enqueued)


def test_a_graph_is_captured_on_the_side_stream_and_replayed_like_a_call(gpu: fake_cuda.Device) -> None:
    clock = fake_cuda.timer(gpu)

    def work() -> None:
        time.sleep(0.003)
        gpu.run(0.001)

    with clock.scope():
        found = clock.beside(work, lambda: gpu.run(0.0, "prepare"), 7)
    assert found.graph_ms == pytest.approx(1, abs=0.01) and found.graph_note == "" and found.peak_mib == 3
    assert found.wall_ms >= 3
    begun = gpu.log.index("capture_begin")
    assert gpu.log[begun : begun + 3] == ["capture_begin", "work", "capture_end"], "the call alone is captured"
    assert gpu.log[begun - 1] == "synchronize" and gpu.log[begun - 2] == "prepare"
    replays = " ".join(gpu.log[begun + 3 :]).split("prepare ")[1:]
    replays[-1] = replays[-1].removesuffix(" synchronize reset")
    assert len(replays) >= 7
    assert {part.strip() for part in replays} == {" ".join(CALL).replace("work", "replay")}
    with pytest.raises(AssertionError, match="default stream"):
        cuda_timer.capture(fake_cuda.Graph(gpu), (0, 7), work)


def test_a_call_that_waits_for_the_device_is_not_captured(gpu: fake_cuda.Device) -> None:
    clock = fake_cuda.timer(gpu)
    with clock.scope():
        found = clock.beside(gpu.wait, None, 7)
    assert found.graph_ms == 0 and found.graph_note == "waits for the device: RuntimeError"
    assert "capture_begin" not in gpu.log and gpu.debug == 0 and found.wall_ms > 0


@pytest.mark.parametrize("mendable", [True, False])
def test_a_capture_that_fails_is_told_and_undone(gpu: fake_cuda.Device, mendable: bool) -> None:
    """Where it cannot be, nothing else is captured: torch's allocator would fail at every turn."""
    clock = fake_cuda.timer(gpu)
    gpu.mendable = mendable

    def work() -> None:
        gpu.run(0.001)
        if gpu.capturing is not None:
            gpu.wait()

    with clock.scope():
        first, second = clock.beside(work, None, 7), clock.beside(lambda: gpu.run(0.001), None, 7)
    assert first.graph_note == "not captured: operation not permitted when stream is capturing"
    assert gpu.log.count("capture_end") == gpu.log.count("capture_begin") == 1 + mendable and gpu.released == 1
    assert bool(second.graph_ms) is mendable and ("could not be undone" in second.graph_note) is not mendable
    clock.clear()


def test_a_call_that_refuses_to_be_captured_leaves_nothing_to_be_undone(gpu: fake_cuda.Device) -> None:
    """Its graph ended, and gives its memory back itself."""
    clock = fake_cuda.timer(gpu)

    def work() -> None:
        if gpu.capturing is not None:
            raise ValueError("not here")

    with clock.scope():
        assert clock.beside(work, None, 7).graph_note == "not captured: not here"
    assert not gpu.broken and gpu.released == 0 and gpu.log[-1] == "capture_end"


class Counted(Runner):
    """Counts the providers whose calls are there at one time."""

    most = 0

    def _measure(self, case: Case, rows: dict, works: dict, deadline: float) -> None:
        self.most = max(self.most, len(works))
        super()._measure(case, rows, works, deadline)


SIZES = {"T": 8, "B": 2, "S": 4, "H": 16, "N": 4, "K": 2, "D": 8, "F": 16, "V": 32, "P": 1000}


@pytest.mark.parametrize(
    ("op", "modes"),
    [
        ("gelu", {"forward", "backward", "full"}),
        ("attention", {"forward", "backward", "full"}),
        ("linear_cross_entropy", {"forward", "full"}),
        ("rope_", {"step"}),
        ("cross_entropy_", {"step"}),
        ("vocab_parallel_cross_entropy_", {"step"}),
        ("adamw_", {"step"}),
    ],
)
def test_providers_come_one_after_the_other_with_all_their_numbers(
    gpu: fake_cuda.Device, op: str, modes: set[str]
) -> None:
    runner = Counted("cpu", repeats=7, cold=False)
    runner.timer = fake_cuda.timer(gpu)
    rows = runner.case(cases.build(op, {**SIZES, "sink": 1}, "bf16", "cpu"))
    runner.finish()
    assert runner.most == 1 and {row.mode for row in rows} == modes
    for row in rows:
        assert row.repeats == 7 and row.note == row.graph_note == ""
        assert row.best_ms == row.p50_ms > 0 and row.wall_ms > 0 and row.peak_mib == 3 and 0 < row.error < 0.02
        assert row.of_ceiling > 0
    assert gpu.log.count("capture_begin") == len(rows) == gpu.log.count("reset")


def test_what_the_budget_leaves_out_is_a_row_that_says_so(gpu: fake_cuda.Device) -> None:
    runner = Runner("cpu", repeats=7, cold=False)
    runner.timer = fake_cuda.timer(gpu)
    runner._end = time.monotonic()
    rows = runner.case(cases.build("gelu", {"T": 8, "F": 16}, "bf16", "cpu"), ["full"])
    assert rows and all(row.note == "skipped: the budget is spent" and not row.repeats for row in rows)
    runner._end, runner._most_compiling, runner._compiling = float("inf"), 1.0, 2.0
    assert runner._skipped("compile").startswith("skipped: 2 s were spent on compiled providers")
    assert runner._skipped("triton") == "" == runner._skipped("torch")


ON_A_GPU = """
import torch
from megapre.kernels.bench import cases
from megapre.kernels.bench.run import Runner

def synchronize_inside(x, bias):
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()  # the capture cannot be ended after this
    return x + bias - x

def wait_inside(x, bias):
    return torch.nn.functional.gelu(x + bias * bias.abs().max().sign().item(), approximate="tanh")

runner = Runner("cuda", repeats=7)
for op, sizes in (
    ("gelu", {"T": 512, "F": 768}),
    ("rms_norm", {"T": 512, "H": 768}),
    ("rope_", {"T": 64, "N": 4, "K": 4, "D": 64}),
    ("linear_cross_entropy", {"T": 256, "H": 64, "V": 1024, "sink": 1}),
):
    case = cases.build(op, sizes, "bf16", "cuda")
    if op == "gelu":
        case.peers = {"flash": wait_inside}
    runner.case(case)
for row in runner.finish():
    print(row)
    if row.provider not in ("flash", "triton", "torch"):
        continue  # other libraries' do as they please
    assert not row.note, row
    assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms and row.wall_ms > 0 and row.of_ceiling > 0, row
    if row.provider == "flash" and row.mode != "backward":
        assert row.graph_note.startswith("waits for the device"), row
    else:
        assert row.graph_ms > 0, row
assert {row.mode for row in runner.rows} == {"forward", "backward", "full", "step"}
case = cases.build("gelu", {"T": 512, "F": 768}, "bf16", "cuda")
with runner.timer.scope():
    x, bias = case.leaves
    broken = runner.timer.beside(lambda: synchronize_inside(x, bias), None, 7)
    after = runner.timer.beside(lambda: x + bias, None, 7)
assert broken.graph_note.startswith("not captured"), broken
assert after.graph_ms > 0, (broken, after)
runner.timer.clear()
print("measured")
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_everything_is_captured_but_what_waits_for_it() -> None:
    """In a process of its own, which a capture that cannot be undone may leave in pieces."""
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("measured\n"), done.stdout + done.stderr
