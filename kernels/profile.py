"""What `megapre bench kernels --write-profile` found out about this machine: one small file for each user.

    {"format": 1, "profiles": [{"key": {"device": "cpu", "hardware": ..., "torch": ..., "version": ..., "level": ...,
                                        "threads": 8},
                                "made": "2026-11-21",
                                "ops": {"rms_norm": {"bf16": {"T=2048,H=768": {"native": [0.31, 0.32, 0.35], ...}}}}}]}

The three numbers are the minimum, 20th and 80th percentile of a call forward and backward in milliseconds. A profile
counts only where its whole key is what is here; a home folder that several machines share may hold one of each.

An implementation displaces the preferred one when in at least one measured shape it is clearly faster (its 80th
percentile is 3% below the other's 20th) and in none more than 3% slower. One implementation an op and dtype serves all
shapes of a run: what a model computes does not depend on how it is cut into batches, and a call costs what it did. So
measure the shapes that you train; each measurement replaces what the file said of its ops and dtypes.

MEGAPRE_KERNEL_PROFILE names another file, or `off`.
"""

import contextlib
import datetime
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import native

MARGIN = 1.03
FORMAT = 1
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

Times = Mapping[str, tuple[float, float, float]]
"""Minimum, p20 and p80 in ms by implementation."""
Ops = Mapping[str, Mapping[str, Mapping[str, Times]]]
"""op -> dtype -> shape -> times."""


@dataclass(frozen=True)
class Profile:
    """What was measured on this machine; empty, with the reason in `state`, where nothing was or it does not count."""

    state: str
    ops: Ops = field(default_factory=dict)

    def better(self, op: str, dtype: str, preferred: str, usable: Iterable[str]) -> tuple[str, str]:
        """(the implementation to use instead of `preferred`, why); the preferred one and "" where none is better.

        Only measurements in `dtype` count; all where it is "".
        """
        known = self.ops.get(op, {})
        counted = {name: of for name, of in known.items() if dtype in (name, "")}
        shapes = {f"{shape} {name}": times for name, of in counted.items() for shape, times in of.items()}
        best, best_gain = preferred, 0.0
        for name in usable:
            gains = [
                (times[preferred][0] / times[name][0], times[preferred][1] >= MARGIN * times[name][2])
                for times in shapes.values()
                if name in times and preferred in times
            ]
            if (
                name == preferred
                or not any(clear for _, clear in gains)
                or any(gain * MARGIN < 1.0 for gain, _ in gains)
            ):
                continue
            gain = sum(gain for gain, _ in gains) / len(gains)
            if gain > best_gain:
                best, best_gain = name, gain
        return best, "" if best == preferred else f"{best_gain:.2f} times as fast as {preferred}"


def path() -> Path | None:
    """The file; None when MEGAPRE_KERNEL_PROFILE is `off`."""
    named = os.environ.get("MEGAPRE_KERNEL_PROFILE", "")
    if named == "off":
        return None
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "megapre" / "kernel-profile.json"


def key(device: str) -> dict[str, str | int]:
    """What times depend on: hardware, software, code path and threads of "cpu" or "cuda"."""
    kind = device.split(":")[0]
    common: dict[str, str | int] = {"device": kind, "hardware": hardware(kind), "torch": torch.__version__}
    # The package that this one is part of, by whatever name; none where it stands alone.
    whole = sys.modules.get(__name__.split(".")[0])
    common["version"] = str(getattr(whole, "__version__", ""))
    if kind == "cuda":
        return common
    return {**common, "level": native.cpu_level(), "threads": torch.get_num_threads()}


def hardware(device: str) -> str:
    """The name of the CPU or GPU as it gives it itself; "none" for a GPU that is not there."""
    if device != "cpu":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load(device: str) -> Profile:
    """The profile for this machine as it is now; warns when the file is there and cannot be read."""
    file = path()
    if file is None:
        return Profile("off: MEGAPRE_KERNEL_PROFILE=off")
    try:
        profiles = _read(file)
    except FileNotFoundError:
        return Profile(f"none at {file}; `megapre bench kernels --write-profile` makes one")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        state = f"ignored: {file} cannot be read as a profile ({type(error).__name__}: {error}); write it again"
        warnings.warn(f"kernels: {state}", stacklevel=2)
        return Profile(state)
    here = key(device)
    for profile in profiles:
        if profile["key"] == here:
            return Profile(f"used: {file} of {profile['made']}, {', '.join(profile['ops'])}", profile["ops"])
    differences = [_difference(profile["key"], here) for profile in profiles]
    closest = min(differences, key=len, default=["it is empty"])
    return Profile(f"ignored: {file}: {'; '.join(closest)}")


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*here, *there])
    return [
        f"{name} was {there.get(name, 'not given')} and is {here.get(name, 'not given')}"
        for name in names
        if there.get(name) != here.get(name)
    ]


def write(device: str, ops: Ops) -> Path:
    """Puts `ops` into the file in place of what it said of the same ops and dtypes here; the path.

    Profiles of the same hardware for other versions go. ValueError when the profile is turned off; OSError.
    """
    file = path()
    if file is None:
        raise ValueError("kernels: MEGAPRE_KERNEL_PROFILE=off turns the profile off; unset it to write one")
    here = key(device)
    profiles: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        profiles = _read(file)
    known: Ops = next((profile["ops"] for profile in profiles if profile["key"] == here), {})
    merged = {op: {**known.get(op, {}), **ops.get(op, {})} for op in (*known, *(op for op in ops if op not in known))}
    outdated = {"torch", "version"}
    kept = [
        profile
        for profile in profiles
        if any(profile["key"].get(name) != value for name, value in here.items() if name not in outdated)
    ]
    kept.append({"key": here, "made": datetime.date.today().isoformat(), "ops": merged})
    content = json.dumps({"format": FORMAT, "profiles": kept}, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, file)  # whole or not at all
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _read(file: Path) -> list[dict[str, Any]]:
    """The profiles of a file, every number looked at. ValueError and its like when it is none."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']} instead of {FORMAT}")
    return [
        {
            "key": dict(profile["key"]),
            "made": str(profile["made"]),
            "ops": {
                op: {
                    dtype: {
                        shape: {name: _three(numbers) for name, numbers in times.items()}
                        for shape, times in shapes.items()
                    }
                    for dtype, shapes in dtypes.items()
                }
                for op, dtypes in profile["ops"].items()
            },
        }
        for profile in content["profiles"]
    ]


def _three(numbers: Any) -> tuple[float, float, float]:
    least, p20, p80 = (float(number) for number in numbers)
    if not 0 < least <= p20 <= p80:
        raise ValueError(f"{numbers} are no times")
    return least, p20, p80
