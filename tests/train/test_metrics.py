"""The step line and the records behind it."""

import math
from pathlib import Path

import pytest
import torch

from megapre.train import machine
from megapre.train.folder import read_metrics
from megapre.train.metrics import ENOUGH, Meter, Record, StepLine, Timed, bytes_text, duration_text
from megapre.train.plot import loss_curve, smoothed
from megapre.train.step import StepResult

CPU = torch.device("cpu")


def record(step: int, loss: float, **changes: object) -> Record:
    whole = Record(step, step * 8, step * 512, loss, 0.906, 3e-4, 0.412, 79456.0, 0.4624, 61.4 * 2**30, 0, False, None)  # type: ignore[arg-type]
    return whole._replace(**changes)


def test_the_line_has_the_shape_that_was_promised() -> None:
    line = StepLine(10000, CPU, 1, [5.0, 4.9] * 40)
    assert line.see(record(120, 4.9349)) == (
        "step   120/10000 | loss 4.9349 (-0.3z) | gnorm 0.91 | lr 3.0e-4 | 412 ms | 79.5k tok/s | mfu 46.2% "
        "| mem 61.4G | eta 1h08m"
    )
    assert "tok/s/gpu" in StepLine(10, torch.device("cuda", 0), 1).see(record(1, 1.0))


def test_unknown_mfu_is_not_guessed_and_a_short_window_gives_no_z() -> None:
    line = StepLine(100, CPU, 1, [5.0, 4.0] * (ENOUGH // 2 - 1))
    text = line.see(record(15, 4.5, mfu=None))
    assert "mfu n/a" in text and "z)" not in text
    line.see(record(16, 4.5))
    assert "z)" in line.see(record(17, 4.5))


def test_the_window_forgets_and_passes_over_nan() -> None:
    line = StepLine(1000, CPU, 1, [100.0] * 500)
    for step in range(128):
        line.see(record(step, [2.0, 4.0][step % 2]))
    assert "loss nan" in line.see(record(128, math.nan))
    assert "(+2.0z)" in line.see(record(129, 5.0))  # mean 3, deviation 1: nothing older, no NaN


def test_the_eta_is_not_led_astray_by_a_slow_first_step() -> None:
    line = StepLine(102, CPU, 1)
    for step in range(1, 5):
        text = line.see(record(step, 1.0, step_time_s=60.0 if step == 1 else 1.0))
    assert text.endswith("eta 1m38s")


def test_records_count_samples_back_from_the_last_step() -> None:
    meter = Meter(CPU, sequences_per_step=8, seq_length=64, mfu=lambda speed: speed / 1e6, skipped_steps=2)
    for step, skipped in ((7, 0.0), (8, 1.0), (9, 0.0)):
        values = (torch.tensor(step / 2), torch.tensor(1.5), torch.tensor(skipped), torch.tensor(0.0))
        meter.add(Timed(step, 1e-3, StepResult(*values), begin=10.0, end=10.5))
    first, second, third = meter.collect(consumed_samples=72)
    assert [r.consumed_samples for r in (first, second, third)] == [56, 64, 72]
    assert [r.skipped_steps for r in (first, second, third)] == [2, 3, 3]
    assert (second.step, second.loss, second.skipped) == (8, 4.0, True)
    assert first.tokens_per_s == 8 * 64 / 0.5 and first.mfu == first.tokens_per_s / 1e6
    assert meter.collect(72) == []


def test_steps_that_still_run_are_left_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is neither read nor counted until it is asked for: reading it would let the device run dry."""
    read: list[float] = []
    original = machine.Told.read
    monkeypatch.setattr(machine.Told, "read", lambda told: read.append(float(told.numbers[0])) or original(told))
    meter = Meter(CPU, sequences_per_step=8, seq_length=64, mfu=lambda speed: None)
    for step in (1, 2, 3):
        values = (torch.tensor(float(step)), torch.tensor(1.5), torch.tensor(float(step == 3)), torch.tensor(0.0))
        meter.add(Timed(step, 1e-3, StepResult(*values), begin=10.0, end=10.5))
    assert [(r.step, r.consumed_samples, r.skipped_steps) for r in meter.collect(24, running=1)] == [
        (1, 8, 0),
        (2, 16, 0),
    ]
    assert read == [1.0, 2.0] and meter.collect(24, running=1) == []
    assert [(r.step, r.consumed_samples, r.skipped_steps) for r in meter.collect(24)] == [(3, 24, 1)]
    assert read == [1.0, 2.0, 3.0]


def test_json_has_null_where_a_number_is_not_finite() -> None:
    values = record(1, math.nan, grad_norm=math.inf, mfu=None).as_json()
    assert values["loss"] is None and values["grad_norm"] is None and values["mfu"] is None
    assert "skipped" not in values


def test_texts() -> None:
    assert [duration_text(s) for s in (0, 59.6, 185, 4080, 90000)] == ["0s", "1m00s", "3m05s", "1h08m", "1d01h"]
    assert [bytes_text(b) for b in (512, 3 * 2**20, 61.4 * 2**30)] == ["0.5K", "3.0M", "61.4G"]


def test_smoothing_starts_without_bias_and_keeps_constants() -> None:
    assert smoothed([3.0] * 10) == pytest.approx([3.0] * 10)
    assert smoothed([2.0] * 500 + [4.0] * 500)[-1] == pytest.approx(4.0, abs=1e-3)


@pytest.mark.parametrize(
    "lines", ["", '{"step": 1, "loss": 6.0}\n', '{"step": 1, "loss": null}\n{"step": 2, "valid_loss": 5}\n']
)
def test_a_curve_can_be_drawn_of_very_little(tmp_path: Path, lines: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert loss_curve(tmp_path, 500, "little").read_bytes().startswith(b"\x89PNG")


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]
