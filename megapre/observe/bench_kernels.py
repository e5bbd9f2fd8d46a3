"""`megapre bench kernels`: which implementation of an op is fastest on this machine, and how far from its limits.

The cases and the timer are those of `kernels.bench`; here a request in words becomes a list of cases, and the rows a
table, files, and the profile by which the registry chooses.
"""

from __future__ import annotations

import datetime
import difflib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import UserError

if TYPE_CHECKING:
    from ..config import Config
    from ..kernels.bench.case import Case
    from ..kernels.bench.run import Plan, Row, Runner

DEFAULT_SHAPE = "gpt2-124m"
LEAST_BYTES = 1 << 20  # that a call must move for a profile to keep its time: below, it is the time of calling
VOCAB = 50257  # of a recipe that leaves its vocabulary to the data: GPT-2's


class BenchRequestError(UserError):
    """An op, a shape, a dtype, a provider or a mode that there is not."""


@dataclass(frozen=True)
class Request:
    """What to measure. Empty `ops`, `shapes`, `providers` and `modes` stand for the sensible ones."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    tokens: int = 2048
    dtypes: tuple[str, ...] = ("bf16",)
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    named_set: str = ""
    device: str = "auto"
    threads: int = 0
    repeats: int = 25
    budget: float = 100.0
    cold: bool = True
    keep_memory: bool = True


@dataclass
class Report:
    """What came out: `rows`, the rates that bound them, and about what machine and settings they speak."""

    about: dict[str, str | int | float | bool]
    ceilings: dict[str, float]
    rows: list[Row]


def run(request: Request, out: str | None = None, write_profile: bool = False) -> int:
    """Measures, prints the table, writes the files. 0; 130 after Ctrl-C, with what was measured until then."""
    from rich.console import Console

    from . import bench_report

    if write_profile:
        _refuse_profile(request)
    device = _prepare(request)
    planned = plans(request, device)
    from ..kernels.bench.run import Runner

    runner = Runner(device, request.providers, request.repeats, request.cold)
    wide = any(plan.goals for plan in planned)
    console = Console(width=None if sys.stdout.isatty() else 140 if wide else 118)
    about = describe(request, device, runner)
    console.print(bench_report.header(about))
    interrupted = False
    cases = 0
    try:
        for _ in _progress(runner, planned, request.budget):
            cases += 1
    except KeyboardInterrupt:
        interrupted = True
    if cases == len(planned) and not runner.rows:
        wanted = ", ".join(request.providers)
        raise BenchRequestError(f"bench kernels: these ops have no {wanted} on {device}; --list shows what each has")
    report = Report(
        {**about, "cases": len(planned), "cases_measured": cases, "interrupted": interrupted},
        runner.ceilings.best,
        runner.finish(),
    )
    for renderable in bench_report.tables(report):
        console.print(renderable)
    if out is not None:
        for line in bench_report.write(report, out):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if interrupted:
        print("megapre: interrupted; the profile was not written" if write_profile else "megapre: interrupted")
        return 130
    if write_profile:
        _write_profile(device, report.rows)
    return 0


def show(device: str) -> int:
    """Prints each op with the sizes it needs and its providers."""
    from rich.console import Console
    from rich.table import Table

    device = _kind(device)
    from ..kernels.bench import cases

    table = Table("op", "sizes", "providers", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    tiny = {**dict.fromkeys("TSHFVPIO", 8), "B": 1, "N": 2, "K": 1, "D": 4}
    for op in cases.ops():
        providers = cases.build(op, tiny, "bf16", device).providers()
        names = [name for name, provider in providers.items() if not provider.why_not]
        table.add_row(op, " ".join(cases.NEEDS[op]), ", ".join(names))
    console = Console(width=None if sys.stdout.isatty() else 118)
    console.print(table)
    console.print("\n" + ", ".join(f"{name} {meaning}" for name, meaning in cases.LEGEND.items()), highlight=False)
    return 0


def _kind(device: str) -> str:
    import torch

    from ..train.machine import DeviceError

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"bench kernels: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _prepare(request: Request) -> str:
    """The device, with the settings that a training run has on it."""
    from ..train import cpu_runtime

    device = _kind(request.device)
    cpu_runtime.set_threads(request.threads)
    if device == "cpu" and request.keep_memory:
        cpu_runtime.keep_freed_memory()
    return device


def plans(request: Request, device: str) -> list[Plan]:
    """The cases in the order they run. BenchRequestError when the request asks for what there is not."""
    from ..kernels.bench import cases, sets
    from ..kernels.bench.case import MODES
    from ..kernels.bench.run import Plan

    modes = [mode for mode in MODES if mode != "step"]
    for mode in request.modes:
        _known("mode", mode, modes)
    if request.named_set:
        _known("set", request.named_set, list(sets.SETS))
        if request.shapes:
            raise BenchRequestError("bench kernels: --set brings its own shapes; leave out --set or --shape")
        chosen = [(e.op, e.sizes, e.dtype, e.goals) for e in sets.SETS[request.named_set] if e.op in cases.ops()]
        chosen = [entry for entry in chosen if not request.ops or entry[0] in request.ops]
    else:
        chosen = [
            (op, sizes, dtype, {})
            for shape in request.shapes or (DEFAULT_SHAPE,)
            for op, sizes in _of_shape(shape, request)
            for dtype in request.dtypes
        ]
    for op in request.ops:
        _known("op", op, cases.ops())
    found = []
    for op, sizes, dtype, goals in chosen:
        try:
            cases.check(op, sizes, dtype)
        except cases.BenchError as error:
            raise BenchRequestError(f"bench kernels: {error}") from None
        build = _builder(op, sizes, dtype, device)
        wanted = request.modes or (tuple(goals) if goals else ())
        found.append(Plan(build, wanted, goals))
    _check_providers(request, [op for op, *_ in chosen], device)
    if not found:
        raise BenchRequestError(
            f"bench kernels: the set {request.named_set} has no case of {', '.join(request.ops)}; "
            f"it has {', '.join(dict.fromkeys(e.op for e in sets.SETS[request.named_set]))}"
        )
    return found


def _builder(op: str, sizes: Mapping[str, int], dtype: str, device: str) -> Callable[[], Case]:
    from ..kernels.bench import cases

    return lambda: cases.build(op, sizes, dtype, device)


def _known(what: str, name: str, names: Iterable[str]) -> None:
    listed = list(names)
    if name not in listed:
        close = difflib.get_close_matches(name, listed, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise BenchRequestError(f"bench kernels: there is no {what} {name!r}{meant}; there are {', '.join(listed)}")


def _check_providers(request: Request, ops: list[str], device: str) -> None:
    """Every wanted provider must exist for some op, and be able to run."""
    from ..kernels import choose
    from ..kernels.bench.case import PEERS, implementations

    choose(device)
    rows = [row for op in dict.fromkeys(ops) for row in implementations(op)]
    names = dict.fromkeys([*(row.name for row in rows), *PEERS])
    for wanted in request.providers:
        _known("provider", wanted, names)
        reasons = [row.why_not(device) for row in rows if row.name == wanted]
        if reasons and all(reasons) and wanted not in PEERS:
            raise BenchRequestError(f"bench kernels: {wanted} cannot run on {device}: {reasons[0]}")


def _of_shape(shape: str, request: Request) -> Iterator[tuple[str, dict[str, int]]]:
    """(op, sizes) of one --shape."""
    from ..kernels.bench import cases, sets

    if "=" in shape:
        sizes = parse(shape)
        fitting = [op for op in cases.ops() if all(name in cases.complete(sizes) for name in cases.NEEDS[op])]
        if not request.ops and not fitting:
            needs = "; ".join(f"{op} {','.join(cases.NEEDS[op])}" for op in cases.ops())
            raise BenchRequestError(f"bench kernels: no op has the sizes {', '.join(sizes)} alone; they need: {needs}")
        for op in request.ops or fitting:
            yield op, sizes
        return
    from ..config import load

    cfg = load(shape)
    sizes = of_model(cfg, request.tokens)
    for op in request.ops or [op for op in cases.ops() if op in ops_of_model(cfg)]:
        for variant in sets.of_sizes(op, sizes) if op in cases.ops() else [sizes]:
            yield op, variant


def parse(text: str) -> dict[str, int]:
    """Sizes from words such as T=2048,H=4096. BenchRequestError on a name or number that is none."""
    from ..kernels.bench import cases

    sizes = {}
    for word in text.split(","):
        name, _, number = word.strip().partition("=")
        _known("size", name, cases.LEGEND)
        if not number.isdecimal() or (int(number) < 1 and len(name) == 1) or int(number) >= 2**40:
            raise BenchRequestError(
                f"bench kernels: {word.strip()}: {cases.LEGEND[name]} must be a whole number from 1"
            )
        sizes[name] = int(number)
    return sizes


def of_model(cfg: Config, tokens: int) -> dict[str, int]:
    """The sizes of a recipe's model at about this many tokens, in rows as long as the recipe trains."""
    from ..plan import count

    model = cfg.model if cfg.model.vocab else cfg.with_vocab(VOCAB).model
    length = min(cfg.batch.seq_length, tokens)
    batch = max(tokens // length, 1)
    return {
        "T": batch * length,
        "B": batch,
        "S": length,
        "H": model.hidden,
        "N": model.heads,
        "K": model.kv_heads,
        "D": model.head_dim,
        "F": model.ffn,
        "V": model.vocab_padded,
        "pad": model.vocab_padded - model.vocab,
        "P": sum(count(model)),
        "bias": int(model.bias),
        "gated": int(model.gated),
    }


def ops_of_model(cfg: Config) -> set[str]:
    """The ops that a step of the recipe spends its time in; of forms in and out of place both."""
    model = cfg.model
    common = {"linear", "embedding", "attention", "cross_entropy", "cross_entropy_", "linear_cross_entropy"}
    norm = "layer_norm" if model.norm == "layernorm" else "rms_norm"
    turned = {"rope", "rope_"} if model.positions == "rope" else set()
    return common | turned | {norm, model.activation, "adamw_", "grad_norm"}


def describe(request: Request, device: str, runner: Runner) -> dict[str, str | int | float | bool]:
    """The machine and the settings, as they go to the head of the table and into the files."""
    import torch

    from ..kernels import native, profile

    about: dict[str, str | int | float | bool] = {
        "hardware": profile.hardware(device),
        "device": device,
        "torch": torch.__version__,
        "megapre": __version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["megapre", *sys.argv[1:]]),
        "counts": runner.timer.by,
        "repeats": request.repeats,
        "caches": "emptied before each call" if request.cold else "as they are",
    }
    if device == "cpu":
        about |= {"threads": torch.get_num_threads(), "level": native.cpu_level() or "no native ops"}
        kept = "freed memory is kept, as in a training run"
        about["memory"] = kept if request.keep_memory else "freed memory is returned, as in plain torch"
    about["profile"] = profile.load(device).state
    return about


def _progress(runner: Runner, planned: list[Plan], budget: float) -> Iterator[list[Row]]:
    """The run, with a line on a terminal that says how far it is."""
    if not sys.stderr.isatty():
        yield from runner.run(planned, budget)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("cases"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("cases", total=len(planned))
        for rows in runner.run(planned, budget):
            bar.advance(task)
            yield rows


def _refuse_profile(request: Request) -> None:
    from ..kernels import profile

    if profile.path() is None:
        raise BenchRequestError(
            "bench kernels: MEGAPRE_KERNEL_PROFILE=off turns the profile off; unset it to write one"
        )
    if request.modes and "full" not in request.modes:
        raise BenchRequestError("bench kernels: a profile compares the mode full; add it to --mode")
    if request.providers:
        raise BenchRequestError("bench kernels: a profile compares all implementations; leave out --provider")
    if not request.cold or not request.keep_memory:
        option = "--return-memory" if request.cold else "--warm"
        raise BenchRequestError(
            f"bench kernels: a profile is made under the conditions of training; leave out {option}"
        )


def profile_of(rows: list[Row]) -> dict[str, dict[str, dict[str, dict[str, tuple[float, float, float]]]]]:
    """What a profile keeps of these rows: times of the registry's implementations as training calls them.

    The shapes are those of training too: times of calls that move less than LEAST_BYTES say nothing of those.
    """
    from ..kernels.registry import IMPLEMENTATIONS, OPS

    known = {(row.op, row.name) for row in IMPLEMENTATIONS}
    found: dict[str, dict[str, dict[str, dict[str, tuple[float, float, float]]]]] = {}
    for row in rows:
        as_trained = row.mode in ("full", "step") and row.repeats and row.bytes >= LEAST_BYTES
        if as_trained and row.op in OPS and (row.op, row.provider) in known:
            shapes = found.setdefault(row.op, {}).setdefault(row.dtype, {})
            shapes.setdefault(row.shape, {})[row.provider] = (row.min_ms, row.p20_ms, row.p80_ms)
    return found


def _write_profile(device: str, rows: list[Row]) -> None:
    from ..kernels import choose, profile
    from ..kernels.bench.case import DTYPES

    found = profile_of(rows)
    if not found:
        raise BenchRequestError(
            "bench kernels: no profile is written: no op was timed forward and backward in a shape that "
            "moves 1 MiB or more; name larger shapes, or raise --budget"
        )
    file = profile.write(device, found)
    print(f"profile written to {file}; this machine's runs use it")
    for dtype in dict.fromkeys(dtype for of in found.values() for dtype in of):
        ops = choose(device, None, DTYPES[dtype])
        changed = [op for op, origin in ops.origins.items() if origin == "profile" and dtype in found.get(op, {})]
        names = ", ".join(f"{op}: {ops.names[op]}" for op in changed)
        print(f"  {dtype}: {names or 'the preferred implementations are the fastest, or not clearly slower'}")
