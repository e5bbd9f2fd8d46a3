"""50 steps of a debug-size model, loss by loss, against the file that an earlier megapre wrote.

Where torch, the level of its CPU kernels, the processor and the chosen kernels are those of the file, every bit must
agree. Elsewhere fp32 numbers are added in another order. Measured between AVX-512, AVX2 and no vectors, one thread and
two, native kernels and none: at most 3e-7 relative in any of the 50 losses. Allowed is 30 times that.

A change that is meant to alter losses writes the file anew:  python tests/golden/test_golden_losses.py
"""

import json
from pathlib import Path

import pytest
import torch

from megapre import kernels
from megapre.config import load
from megapre.optim.schedules import lr_at
from megapre.train import machine
from megapre.train.bench import made_up
from megapre.train.step import Engine

STEPS = 50
TOLERANCE = 1e-5
NAMES = ("llama", "gpt2")


def losses(name: str) -> list[float]:
    """A run of the debug recipe: Llama-style, or with GPT-2's parts. Its eight batches come again and again."""
    cfg = load("debug", ["model.vocab=500", f"model.family={name}", f"run.steps={STEPS}", "optim.clip=0.5"])
    engine, batches = Engine(cfg, torch.device("cpu")), made_up(cfg)
    return [engine.step(next(batches), lr_at(step, cfg.optim, STEPS)).loss.item() for step in range(1, STEPS + 1)]


def ground() -> dict[str, object]:
    """What the bits of a loss depend on beside megapre itself."""
    return {
        "torch": torch.__version__,
        "cpu_level": torch.backends.cpu.get_cpu_capability(),
        "cpu": machine.describe(torch.device("cpu")),
        "kernels": kernels.choose("cpu").names,
    }


def golden(name: str) -> Path:
    return Path(__file__).parent / f"{name}.json"


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_golden_file(name: str) -> None:
    file = json.loads(golden(name).read_text())
    expected = [float.fromhex(loss) for loss in file["losses"]]
    found = losses(name)
    assert expected[-1] < expected[0] - 0.5, "the file holds a run that learned nothing"
    if file["ground"] == ground():
        assert [loss.hex() for loss in found] == file["losses"]
    for step, (loss, want) in enumerate(zip(found, expected, strict=True)):
        assert loss == pytest.approx(want, rel=TOLERANCE), f"step {step + 1}"


def write() -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        values = [loss.hex() for loss in losses(name)]
        golden(name).write_text(json.dumps({"ground": ground(), "losses": values}, indent=1) + "\n")


if __name__ == "__main__":
    write()
