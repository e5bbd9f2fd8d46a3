"""The picture of a training step beside its peers: one bar a row, none longer than its model's fastest."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_picture", BENCHMARKS / "step_picture.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_row_is_a_bar(picture: ModuleType, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bars: list[float] = []
    original = Axes.barh

    def barh(self: Axes, y: float, width: float, **settings: object) -> object:
        bars.append(width)
        return original(self, y, width, **settings)

    monkeypatch.setattr(Axes, "barh", barh)
    rows = [
        {"case": case, "provider": provider, "tokens_per_s": rate, "memory_bytes": 2.0**30}
        for case, provider, rate in (
            ("gpt2", "megapre", 500.0),
            ("llama", "megapre", 9.0),
            ("gpt2", "hf-bf16", 250.0),
            ("llama", "plain", 18.0),
        )
    ][:count]
    picture.draw(rows, "a-gpu", tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert bars == {0: [], 1: [100.0], 4: [100.0, 50.0, 50.0, 100.0]}[count]
