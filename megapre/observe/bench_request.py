"""What `megapre bench kernels` is asked for: a request in words becomes a list of cases."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..config import Config
    from ..kernels.bench.case import Case
    from ..kernels.bench.run import Plan

DEFAULT_SHAPE = "gpt2-124m"


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
    policies: bool = False


def plans(request: Request, device: str) -> list[Plan]:
    """The cases in the order they run. BenchRequestError when the request asks for what there is not."""
    from ..kernels.bench import cases, policies, sets
    from ..kernels.bench.case import MODES
    from ..kernels.bench.run import Plan

    modes = [mode for mode in MODES if mode != "step"]
    for mode in request.modes:
        _known("mode", mode, modes)
    if request.named_set:
        _known("set", request.named_set, list(sets.SETS))
        if device == "cpu" and request.named_set in sets.OF_GPU:
            raise BenchRequestError(
                f"bench kernels: the set {request.named_set} has sizes and goals of a GPU, and this runs on the cpu; "
                "the CPU's is --set targets"
            )
        if request.shapes:
            raise BenchRequestError("bench kernels: --set brings its own shapes; leave out --set or --shape")
        chosen = [entry for entry in sets.SETS[request.named_set] if entry.op in cases.ops()]
        chosen = [entry for entry in chosen if not request.ops or entry.op in request.ops]
    else:
        chosen = [
            sets.Entry(op, sizes, dtype)
            for shape in request.shapes or (DEFAULT_SHAPE,)
            for op, sizes in _of_shape(shape, request)
            for dtype in request.dtypes
        ]
    for op in request.ops:
        _known("op", op, cases.ops())
    if request.policies and not any(entry.op in policies.POLICIES for entry in chosen):
        raise BenchRequestError(f"bench kernels: --policies is for {', '.join(policies.POLICIES)}; name one of them")
    found = []
    for op, sizes, dtype, goals in chosen:
        try:
            cases.check(op, sizes, dtype)
        except cases.BenchError as error:
            raise BenchRequestError(f"bench kernels: {error}") from None
        wanted = request.modes or (tuple(goals) if device == "cpu" else ())  # a GPU has the time for all of them
        title = (op, ",".join(f"{name}={size}" for name, size in sizes.items()), dtype)
        found.append(Plan(_builder(op, sizes, dtype, device, request.policies), wanted, goals, title))
    _check_providers(request, [entry.op for entry in chosen], device)
    if not found:
        raise BenchRequestError(
            f"bench kernels: the set {request.named_set} has no case of {', '.join(request.ops)}; "
            f"it has {', '.join(dict.fromkeys(e.op for e in sets.SETS[request.named_set]))}"
        )
    return found


def _builder(op: str, sizes: Mapping[str, int], dtype: str, device: str, more: bool) -> Callable[[], Case]:
    from ..kernels.bench import cases, policies

    def build() -> Case:
        case = cases.build(op, sizes, dtype, device)
        return policies.add(case) if more else case

    return build


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
    from ..config import GPT2_VOCAB
    from ..plan import count

    model = cfg.model if cfg.model.vocab else cfg.with_vocab(GPT2_VOCAB).model
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
