"""What a run reports of its steps: the step line, metrics.jsonl, TensorBoard.

Values of a step are sent to the host as the step ends, and nobody waits for them until they are read, some steps later.
metrics.jsonl gets one object for every step:

    step, consumed_samples, consumed_tokens, loss (nats a token), grad_norm (before clipping), lr, step_time_s,
    tokens_per_s (of all ranks together), mfu (fraction, or null where the device's peak is unknown), memory_bytes (peak
    of rank 0), skipped_steps (so far), and in fp16 loss_scale (that the step ran with)

loss and grad_norm are null where they were not finite: JSON has no NaN. A validation writes an object of its own: step,
consumed_samples, consumed_tokens, valid_loss, valid_tokens.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch

from . import machine

if TYPE_CHECKING:
    from .step import StepResult

WINDOW = 128  # steps that the z-score of a loss and the ETA look back on
ENOUGH = 16  # steps below which a standard deviation says nothing


class Timed(NamedTuple):
    """A step whose values may still be on the device."""

    step: int
    lr: float
    result: StepResult
    begin: machine.Mark
    end: machine.Mark


class Record(NamedTuple):
    """A finished step in plain numbers. `loss` and `grad_norm` may be NaN or infinite here."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    tokens_per_s: float
    mfu: float | None
    memory_bytes: int
    skipped_steps: int
    skipped: bool
    loss_scale: float | None

    def as_json(self) -> dict[str, Any]:
        values = self._asdict()
        del values["skipped"]
        if self.loss_scale is None:
            del values["loss_scale"]
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Meter:
    """Turns timed steps into records."""

    def __init__(
        self,
        device: torch.device,
        sequences_per_step: int,
        seq_length: int,
        mfu: Callable[[float], float | None],
        skipped_steps: int = 0,
    ) -> None:
        """`mfu` maps tokens/s to the fraction of the device's peak."""
        self.device = device
        self.sequences, self.seq_length = sequences_per_step, seq_length
        self.mfu = mfu
        self.skipped_steps = skipped_steps
        self.waiting: list[tuple[Timed, machine.Told]] = []

    def add(self, timed: Timed) -> None:
        loss, norm, skipped, _, scale = timed.result
        told = machine.Told(torch.stack([loss, norm, skipped, *([] if scale is None else [scale])]))
        self.waiting.append((timed, told))

    def collect(self, consumed_samples: int, running: int = 0) -> list[Record]:
        """Records of the waiting steps but for the newest `running`, which the device may go on with; it waits for the
        others. `consumed_samples` is the count after the last of all."""
        ended = self.waiting[: max(len(self.waiting) - running, 0)]
        if not ended:
            return []
        memory = machine.peak_memory(self.device)
        records = []
        for at, (timed, told) in enumerate(ended):
            loss, norm, skipped, *scale = told.read()
            samples = consumed_samples - (len(self.waiting) - 1 - at) * self.sequences
            duration = machine.seconds(timed.begin, timed.end)
            tokens_per_s = self.sequences * self.seq_length / duration
            self.skipped_steps += int(skipped)
            records.append(
                Record(
                    step=timed.step,
                    consumed_samples=samples,
                    consumed_tokens=samples * self.seq_length,
                    loss=loss,
                    grad_norm=norm,
                    lr=timed.lr,
                    step_time_s=duration,
                    tokens_per_s=tokens_per_s,
                    mfu=self.mfu(tokens_per_s),
                    memory_bytes=memory,
                    skipped_steps=self.skipped_steps,
                    skipped=bool(skipped),
                    loss_scale=scale[0] if scale else None,
                )
            )
        self.waiting = self.waiting[len(ended) :]
        return records


class StepLine:
    """Writes records as lines. Knows the last losses and step times, for the z-score and the ETA."""

    def __init__(self, steps: int, device: torch.device, world: int, earlier_losses: Iterable[float] = ()) -> None:
        self.steps = steps
        self.sharers, self.rate = (world, "tok/s/gpu") if device.type == "cuda" else (1, "tok/s")
        self.losses = deque(earlier_losses, maxlen=WINDOW)
        self.times: deque[float] = deque(maxlen=WINDOW)

    def see(self, record: Record) -> str:
        """The line of `record`, whose loss is compared with the window before it."""
        z = self._z(record.loss)
        if math.isfinite(record.loss):
            self.losses.append(record.loss)
        self.times.append(record.step_time_s)
        width = len(str(self.steps))
        left = (self.steps - record.step) * median(self.times)
        return " | ".join(
            [
                f"step {record.step:>{width}}/{self.steps}",
                f"loss {record.loss:.4f}{z}",
                f"gnorm {record.grad_norm:.2f}",
                *([] if record.loss_scale is None else [f"scale {record.loss_scale:.10g}"]),
                f"lr {_rate(record.lr)}",
                f"{_milliseconds(record.step_time_s)}",
                f"{_short(record.tokens_per_s / self.sharers)} {self.rate}",
                f"mfu {percent_text(record.mfu)}",
                f"mem {bytes_text(record.memory_bytes)}",
                f"eta {duration_text(left)}",
            ]
        )

    def _z(self, loss: float) -> str:
        if len(self.losses) < ENOUGH:
            return ""
        deviation = pstdev(self.losses)
        return f" ({(loss - fmean(self.losses)) / deviation:+.1f}z)" if deviation > 0 else ""


class Journal:
    """metrics.jsonl and TensorBoard. TensorBoard is imported at the first event, after the first step line is out."""

    def __init__(
        self, metrics: Path | None, tensorboard: Path | None, warn: Callable[[str], None], purge_step: int
    ) -> None:
        """`metrics`: the file, None where another rank writes it. `tensorboard`: folder for events, or None. Events
        there from `purge_step` on are void (a resumed run).
        """
        self.file: IO[str] | None = None if metrics is None else metrics.open("a", encoding="utf-8")
        self.tensorboard, self.warn, self.purge_step = tensorboard, warn, purge_step
        self.events: Any = None
        self.warned = False

    def write(self, record: dict[str, Any]) -> None:
        """Writes one object. A failure is reported once, not raised: the run is worth more than its record."""
        try:
            if self.file is not None:
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
            self._write_events(record)
        except OSError as error:
            self._warn_once(error)

    def close(self) -> None:
        for file in (self.file, self.events):
            try:
                if file is not None:
                    file.close()
            except OSError as error:
                self._warn_once(error)

    def _warn_once(self, error: OSError) -> None:
        if not self.warned:
            self.warned = True
            name = "events" if self.file is None else self.file.name
            self.warn(f"megapre: {name} cannot be written, training goes on: {error}")

    def _write_events(self, record: dict[str, Any]) -> None:
        if self.tensorboard is not None and self.events is None:
            self._open_events(self.tensorboard)
        if self.events is not None:
            for name, value in record.items():
                if name not in ("step", "consumed_samples", "valid_tokens") and value is not None:
                    self.events.add_scalar(name, value, record["step"])

    def _open_events(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.tensorboard = None
            self.warn("TensorBoard is not installed, no events are written; pip install 'megapre[observe]'")
            return
        self.events = SummaryWriter(str(folder), purge_step=self.purge_step)


def _rate(lr: float) -> str:
    """3.0e-4, without the padding zero of Python's exponent."""
    mantissa, _, exponent = f"{lr:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{number:.0f}"


def percent_text(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"


def bytes_text(count: float) -> str:
    """61.4G: binary units, as device memory is sold and reported."""
    for power, unit in ((30, "G"), (20, "M")):
        if count >= 2**power:
            return f"{count / 2**power:.1f}{unit}"
    return f"{count / 2**10:.1f}K"


def duration_text(seconds: float) -> str:
    """1h08m, 3m05s, 42s."""
    for big, small, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if seconds >= big - small / 2:
            parts = divmod(round(seconds / small), big // small)
            return f"{parts[0]}{names[0]}{parts[1]:02d}{names[1]}"
    return f"{seconds:.0f}s"
