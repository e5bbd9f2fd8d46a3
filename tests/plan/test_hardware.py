"""The table of peaks: consistent in itself, and silent about what it does not know."""

import pytest

from megapre.plan import find
from megapre.plan.hardware import DEVICES


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
    ],
)
def test_dense_peaks(name: str, bf16: float) -> None:
    device = find(name)
    assert device is not None
    assert device.peak("bf16") == device.peak("fp16") == bf16


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "AMD EPYC",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 D",
        "H100",
        "Tesla T4",
    ],
)
def test_what_is_merely_alike_is_unknown(name: str) -> None:
    assert find(name) is None


def test_names_are_unique_and_rates_plausible() -> None:
    names = [name for device in DEVICES for name in device.names]
    assert len(names) == len(set(names))
    for device in DEVICES:
        assert device.source
        assert device.fp32 < device.bf16
        assert device.fp8 is None or device.fp8 == pytest.approx(2 * device.bf16, rel=0.015)  # rounding in datasheets
        assert 70 < device.bf16 / device.bandwidth < 500  # FLOPs a byte: dense, and the units agree
        assert device.peak("fp32") == device.fp32
        assert device.peak("fp8") == device.fp8
