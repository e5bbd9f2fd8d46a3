"""The table of peaks: consistent in itself, and silent about what it does not know."""

import re

import pytest

from megapre.plan import find
from megapre.plan.hardware import DEVICES, UnknownDevice, named


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
        size = re.search(r"(\d+)GB( PCIe| HBM3)?$", device.names[0])  # but of a GH200 that is the CPU's
        assert size is None or "GH200" in device.names[0] or device.memory == int(size[1])
        assert 24 <= device.memory < 200
        assert device.peak("fp32") == device.fp32
        assert device.peak("fp8") == device.fp8


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("H200", "NVIDIA H200"),  # though NVIDIA H200 NVL and NVIDIA GH200 480GB hold it too
        ("h200 nvl", "NVIDIA H200 NVL"),
        ("hbm3", "NVIDIA H100 80GB HBM3"),
        ("h800", "NVIDIA H800"),
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("a100-sxm4-80gb", "A100-SXM4-80GB"),
        *((name, name) for device in DEVICES for name in device.names),
    ],
)
def test_a_part_of_a_name_will_do(text: str, name: str) -> None:
    assert named(text) == (name, find(name))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100", r"'H100' may be NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe, NVIDIA H100 NVL: give more of its name"),
        ("H200X", r"no peaks are known of --gpu 'H200X'; nearest: NVIDIA H200; known are NVIDIA A100-SXM4-40GB, "),
        ("abacus", r"'abacus'; known are"),
        ("", r"''; known are"),
    ],
)
def test_what_is_no_devices_name_is_refused(text: str, said: str) -> None:
    with pytest.raises(UnknownDevice, match=said):
        named(text)
