"""`megapre doctor`: what this machine has, what megapre uses of it, and why it does not use the rest.

It is for when things are broken, so nothing here may need what it reports on: each probe runs by itself, and one that
fails becomes a line that says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..train import cpu_runtime

if TYPE_CHECKING:
    from rich.console import Console

Fact = tuple[str, str]
"""What it is, and what was found."""

PACKAGES = {
    "torch": "everything but plan and config",
    "numpy": "everything",
    "pydantic": "config",
    "tokenizers": "BPE tokenizers",
    "tiktoken": "BPE tokenizers",
    "sentencepiece": "SentencePiece tokenizers",
    "safetensors": "export",
    "zstandard": ".zst input",
    "pyarrow": ".parquet input",
    "triton": "Triton kernels on CUDA",
    "matplotlib": "the loss plot",
    "tensorboard": "TensorBoard events",
}
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_bf16")
TOOLS = ("c++", "cmake", "ninja", "nvcc")


def run() -> int:
    """Prints the report to standard output. Returns 0, or 1 where torch does not import."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 104)
    for title, probe in SECTIONS:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(width=26)
        table.add_column(ratio=1, overflow="fold")
        for what, found in facts(probe):
            table.add_row(Text(f"  {what}"), Text(found))
        console.print(Text(title, style="bold"), table, "", sep="\n")
    console.print(Text("Kernels, in order of preference", style="bold"))
    try:
        kernels(console)
    except Exception as error:  # as in `facts`
        console.print(Text(f"  failed  {type(error).__name__}: {error}"))
    if broken := _torch_is_broken():
        console.print(Text(f"torch does not import, so nothing can train here: {broken}", style="bold red"))
    return 1 if broken else 0


def facts(probe: Callable[[], Iterator[Fact]]) -> list[Fact]:
    """What `probe` finds, and where it fails, that it did."""
    found: list[Fact] = []
    try:
        for fact in probe():
            found.append(fact)
    except Exception as error:  # a broken installation can raise anything, and that is the finding
        found.append(("failed", f"{type(error).__name__}: {error}"))
    return found


def software() -> Iterator[Fact]:
    yield "megapre", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} at {sys.executable}"
    yield "system", platform.platform()
    for package, need in PACKAGES.items():
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, f"not installed; needed for {need}"


def cpu() -> Iterator[Fact]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = (line.partition(":") for line in text.splitlines())
    info = {key.strip(): value.strip() for key, _, value in lines}
    flags = set(info.get("flags", "").split())
    yield "model", info.get("model name", platform.processor() or platform.machine())
    yield "features", ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "none of " + ", ".join(CPU_FLAGS)
    yield "memory", f"{_gib(_memory('MemAvailable'))} free of {_gib(_memory('MemTotal'))}"
    yield from cpu_runtime.facts(os.environ)
    torch = importlib.import_module("torch")
    yield "torch's code path", torch.backends.cpu.get_cpu_capability()


def gpus() -> Iterator[Fact]:
    from ..plan import hardware

    torch = importlib.import_module("torch")
    yield "torch's CUDA", torch.version.cuda or f"none: torch {torch.__version__} is built for the CPU alone"
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        yield (
            "devices",
            "none" + (f", although there is {driver}: see what it says" if driver else "; no NVIDIA driver"),
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        device = hardware.find(properties.name)
        peak = f"{device.bf16 / 1e12:g} TFLOP/s dense bf16" if device else "peak unknown, so mfu is n/a"
        sm = f"sm_{properties.major}{properties.minor}"
        memory = f"{_gib(free)} free of {_gib(total)}"
        yield f"cuda:{index}", f"{properties.name}, {sm}, {properties.multi_processor_count} SMs, {memory}, {peak}"


def native() -> Iterator[Fact]:
    mode = os.environ.get("MEGAPRE_NATIVE", "auto")
    yield "MEGAPRE_NATIVE", mode
    try:
        host = importlib.import_module("megapre._host")
        yield "host module", "not used, NumPy instead: turned off" if mode == "0" else f"used: {host.__file__}"
    except ImportError as error:
        yield "host module", f"not used, NumPy instead: {error}"
    library = importlib.import_module("megapre.kernels.native")
    loaded, why_not = library.status()
    yield "native ops", f"used: {library.LIBRARY}" if loaded else f"not used, plain torch instead: {why_not}"
    loaded_cuda, why_no_cuda = library.cuda_status()
    yield "CUDA kernels", f"used: {library.CUDA_LIBRARY}" if loaded_cuda else f"not used: {why_no_cuda}"
    if loaded:
        torch = importlib.import_module("torch")
        for dtype in ("bfloat16", "float16"):
            own = torch.ops.megapre.has_products_of(getattr(torch, dtype))
            yield (
                f"{dtype} products",
                "by this CPU's own instructions" if own else "through fp32 vectors: slower than fp32",
            )
        yield "their code path", f"{library.cpu_level()} (MEGAPRE_CPU_LEVEL forces one)"


def tools() -> Iterator[Fact]:
    for tool in TOOLS:
        path = shutil.which(tool) or shutil.which(str(Path(sys.executable).parent / tool))
        yield tool, f"{path}: {_version(path)}" if path else "not found"
    for variable in ("CUDA_HOME", "CC", "CXX"):
        if variable in os.environ:
            yield variable, os.environ[variable]


def profile() -> Iterator[Fact]:
    torch = importlib.import_module("torch")
    profiles = importlib.import_module("megapre.kernels.profile")
    importlib.import_module("megapre.train.cpu_runtime").set_threads(0)  # a profile is for a number of threads: a run's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say is what is shown here
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            yield f"{device} profile", profiles.load(device).state


def kernels(console: Console) -> None:
    """For each device a table: every implementation of each op, the one in use and why, and why not the others."""
    from rich.table import Table
    from rich.text import Text

    torch = importlib.import_module("torch")
    registry = importlib.import_module("megapre.kernels")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column, width in (("  op", 37), ("implementation", 18), ("", 6)):
            table.add_column(column, width=width, no_wrap=True)
        table.add_column(f"on {device}", overflow="fold")
        reasons: dict[str, int] = {}
        last = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = registry.table(device)
        for row in rows:
            op, last = ("" if row.op == last else f"  {row.op}"), row.op
            absent = f"not here ({reasons.setdefault(row.why_not, len(reasons) + 1)})" if row.why_not else ""
            takes = f"takes {row.takes}" if row.takes and not row.why_not else ""
            note = "; ".join(part for part in (absent, row.why, takes) if part)
            used, style = ("in use", "bold") if row.chosen else ("", "" if row.available else "dim")
            table.add_row(*(Text(cell) for cell in (op, row.implementation, used, note)), style=style)
        console.print(table)
        for reason, number in reasons.items():
            console.print(Text(f"  ({number}) {reason}", style="dim"))


def disk() -> Iterator[Fact]:
    for what, path in (("here", Path.cwd()), ("temporary files", Path(os.environ.get("TMPDIR", "/tmp")))):
        usage = shutil.disk_usage(path)
        yield what, f"{_gib(usage.free)} free of {_gib(usage.total)} at {path}"


SECTIONS: tuple[tuple[str, Callable[[], Iterator[Fact]]], ...] = (
    ("Software", software),
    ("CPU", cpu),
    ("GPU", gpus),
    ("Native code", native),
    ("Measured kernels", profile),
    ("Build tools", tools),
    ("Disk", disk),
)


def _torch_is_broken() -> str:
    """Why torch does not import; empty if it does."""
    try:
        importlib.import_module("torch")
    except Exception as error:  # a torch whose libraries do not fit raises OSError and worse
        return f"{type(error).__name__}: {error}"
    return ""


def _version(tool: str) -> str:
    """The line of `tool --version` that holds a number."""
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = [line for line in done.stdout.splitlines() if "release" in line or any(c.isdigit() for c in line)]
    return next((line for line in lines if "release" in line), lines[0] if lines else "no version given").strip()


def _memory(key: str) -> int:
    """Bytes of a line of /proc/meminfo; 0 where there is none."""
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size else "unknown"
