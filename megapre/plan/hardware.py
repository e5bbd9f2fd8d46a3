"""Peak rates of accelerators, for MFU. Dense, never with 2:4 sparsity, at the maker's boost clock.

A device is matched by the exact name that its driver reports, because a name that is merely alike is another machine:
an H100 PCIe has 3/4 of the rate of an SXM one, an "H100 ... MIG 1g.10gb" a seventh, an A10G about half of an A10.
Unknown devices and CPUs have no row, and their MFU is null. A user who names a device may give a part of its name.
"""

import difflib
from dataclasses import dataclass

from ..errors import UserError

T, G = 10**12, 10**9


@dataclass(frozen=True)
class Device:
    """Peaks of one device: FLOP/s by dtype (accumulation in fp32; fp32 without TF32; None = has none), bytes/s; and
    GiB of memory as its maker names it (written as GB). A run goes by what the driver shows, which is a little less.
    """

    names: tuple[str, ...]
    bf16: float
    fp32: float
    fp8: float | None
    bandwidth: float
    memory: int
    source: str

    def peak(self, dtype: str) -> float | None:
        """FLOP/s in "bf16", "fp16" (which every GPU here multiplies at the rate of bf16), "fp32" or "fp8"."""
        return {"bf16": self.bf16, "fp16": self.bf16, "fp32": self.fp32, "fp8": self.fp8}[dtype]


A100 = "NVIDIA A100 datasheet (2021): 312 bf16, 19.5 fp32"
H100 = "NVIDIA H100 datasheet (2023), halved where it counts sparsity"
H200 = "NVIDIA H200 datasheet (2024), halved where it counts sparsity"
BLACKWELL = "NVIDIA Blackwell architecture technical brief (2024), dense"
ADA = "NVIDIA Ada GPU architecture whitepaper (2023), appendix A, fp32 accumulation, dense"
AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper (2021), appendix A, fp32 accumulation, dense"

DEVICES = (
    Device(("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), 312 * T, 19.5 * T, None, 1555 * G, 40, A100),
    Device(("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"), 312 * T, 19.5 * T, None, 1555 * G, 40, A100),
    Device(("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), 312 * T, 19.5 * T, None, 2039 * G, 80, A100),
    Device(("NVIDIA A100 80GB PCIe",), 312 * T, 19.5 * T, None, 1935 * G, 80, A100),
    Device(("NVIDIA H100 80GB HBM3", "NVIDIA H800"), 989.4 * T, 66.9 * T, 1978.9 * T, 3352 * G, 80, H100),
    Device(("NVIDIA H100 PCIe",), 756 * T, 51.2 * T, 1513 * T, 2039 * G, 80, H100),
    Device(("NVIDIA H100 NVL",), 835.5 * T, 60 * T, 1671 * T, 3938 * G, 94, H100),
    Device(
        ("NVIDIA GH200 480GB",), 989.4 * T, 66.9 * T, 1978.9 * T, 4023 * G, 96, "NVIDIA GH200 datasheet (2023), 96 GB"
    ),
    Device(("NVIDIA H200",), 989.4 * T, 66.9 * T, 1978.9 * T, 4800 * G, 141, H200),
    Device(("NVIDIA H200 NVL",), 835.5 * T, 60 * T, 1671 * T, 4800 * G, 141, H200),
    Device(("NVIDIA B200",), 2250 * T, 75 * T, 4500 * T, 8000 * G, 180, BLACKWELL),
    Device(("NVIDIA GB200",), 2500 * T, 80 * T, 5000 * T, 8000 * G, 186, BLACKWELL),
    Device(("NVIDIA L4",), 121 * T, 30.3 * T, 242.5 * T, 300 * G, 24, "NVIDIA L4 datasheet (2023), halved"),
    Device(("NVIDIA L40S",), 362 * T, 91.6 * T, 733 * T, 864 * G, 48, "NVIDIA L40S datasheet (2023), dense"),
    Device(("NVIDIA A10",), 125 * T, 31.2 * T, None, 600 * G, 24, "NVIDIA A10 datasheet (2021), dense"),
    Device(("NVIDIA A40",), 149.7 * T, 37.4 * T, None, 696 * G, 48, "NVIDIA A40 datasheet (2021), dense"),
    Device(("NVIDIA RTX A6000",), 154.8 * T, 38.7 * T, None, 768 * G, 48, AMPERE),
    Device(("NVIDIA GeForce RTX 3090",), 71 * T, 35.6 * T, None, 936 * G, 24, AMPERE),
    Device(("NVIDIA GeForce RTX 4090",), 165.2 * T, 82.6 * T, 330.3 * T, 1008 * G, 24, ADA),
)


def find(name: str) -> Device | None:
    """The row of the device whose driver reports `name`, or None: then nothing is claimed about it."""
    return next((device for device in DEVICES if name in device.names), None)


class UnknownDevice(UserError):
    """A name that is no device's in the table, or a part of the names of several."""


def named(text: str) -> tuple[str, Device]:
    """The full name and the row of the device that a user calls `text`: its name, with or without the maker's, or a
    part that no other has, in any case: "h200", "4090". Raises UnknownDevice.
    """
    wanted, rows = text.strip().lower(), {name: device for device in DEVICES for name in device.names}
    short = {name.removeprefix("NVIDIA ").lower(): name for name in reversed(rows)}
    if whole := next((name for name in rows if name.lower() == wanted), short.get(wanted)):
        return whole, rows[whole]
    found = {device: device.names[0] for device in DEVICES if any(wanted in name.lower() for name in device.names)}
    if wanted and len(found) == 1:
        (device,) = found
        return next(name for name in device.names if wanted in name.lower()), device
    if wanted and found:
        raise UnknownDevice(f"--gpu {text!r} may be {', '.join(found.values())}: give more of its name")
    near = [short[name] for name in difflib.get_close_matches(wanted.removeprefix("nvidia "), short, n=1, cutoff=0.5)]
    hint = "".join(f"; nearest: {name}" for name in near)
    raise UnknownDevice(
        f"no peaks are known of --gpu {text!r}{hint}; known are {', '.join(d.names[0] for d in DEVICES)}"
    )
