"""The plan as a box of text, shown before step 1: what will run, what it will need."""

import textwrap
from collections.abc import Mapping, Sequence

from .flops import CONVENTION
from .params import Parameters
from .prediction import Plan

WIDTH = 96
"""Columns, frame included: fits a terminal of 100 and a log."""

NO_BREAK = "\N{NO-BREAK SPACE}"

Row = tuple[str, str]


def render(plan: Plan, extras: Mapping[str, str] | None = None) -> str:
    """The plan in a frame of WIDTH columns. `extras` are more rows, label to text (of several lines, if need be)."""
    cfg = plan.cfg
    rows: list[Row] = [
        ("model", _model(plan)),
        ("parameters", _parameters(plan.parameters, cfg.model.tied)),
        ("batch", _batch(plan)),
        ("steps", _steps(plan)),
        ("FLOPs", _flops(plan)),
        ("memory", _memory(plan)),
        ("device", _device(plan)),
        ("mesh", str(plan.mesh)),
        *(extras or {}).items(),
    ]
    return "\n".join(_frame(f"{cfg.name}: what will run", rows))


def _frame(title: str, rows: Sequence[Row]) -> list[str]:
    column = max(len(label) for label, _ in rows) + 2
    room = WIDTH - column - 4
    lines = [f"╭─ {title} ".ljust(WIDTH - 1, "─") + "╮"]
    for label, text in rows:
        wrapped = [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, room) or [""]]
        for i, line in enumerate(wrapped):
            line = line.replace(NO_BREAK, " ")
            lines.append(f"│ {(label if i == 0 else '').ljust(column)}{line.ljust(room)} │")
    return [*lines, "╰" + "─" * (WIDTH - 2) + "╯"]


def _model(plan: Plan) -> str:
    model = plan.cfg.model
    heads = f"{model.heads} heads of {model.head_dim}"
    if model.kv_heads != model.heads:
        heads += f" over {model.kv_heads} key-value heads"
    return (
        f"{model.family}: {model.layers} layers, hidden {model.hidden}, {heads}\n"
        f"{model.activation} of width {model.ffn}, {model.norm}, {model.positions} positions, context {model.context}, "
        f"vocab {model.vocab:,}"
    )


def _parameters(parameters: Parameters, tied: bool) -> str:
    total = sum(parameters)
    lines = [f"{total:,}"]
    for part, size in parameters._asdict().items():
        if size:
            note = " (head too)" if part == "embedding" and tied else ""
            lines.append(f"  {part:<10} {size:>15,}  {size / total:>6.1%}{note}")
    return "\n".join(lines)


def _batch(plan: Plan) -> str:
    batch, dp = plan.cfg.batch, plan.mesh.dp
    return (
        f"{batch.global_:,} sequences x {batch.seq_length:,} = {batch.tokens:,} tokens a step\n"
        f"= {batch.micro} in a micro-batch x {counted(plan.micro_batches, 'micro-batch')} x {counted(dp, 'replica')}"
    )


def _steps(plan: Plan) -> str:
    ratio = plan.tokens / sum(plan.parameters)
    return f"{plan.cfg.run.steps:,}; {plan.tokens:,} tokens in all, {ratio:,.1f} a parameter"


def _flops(plan: Plan) -> str:
    return (
        f"{scaled(plan.flops_per_token)}FLOP a token, causal attention counted as {CONVENTION} "
        f"({scaled(plan.flops_per_token_full)}FLOP as full)\n"
        f"{scaled(plan.flops_per_token * plan.cfg.batch.tokens)}FLOP a step, "
        f"{scaled(plan.flops_per_token * plan.tokens)}FLOP in all"
    )


def _memory(plan: Plan) -> str:
    memory = plan.memory
    parts = [f"{name} {gib(size)}" for name, size in memory.as_json().items() if name != "total" and size]
    rank = "on the fullest rank, " if plan.mesh.world > 1 else ""
    text = f"{gib(memory.total)} {rank}beside the process itself\n" + ", ".join(
        part.replace(" ", NO_BREAK) for part in parts
    )
    if plan.room is None or memory.total <= plan.room:
        return text
    return (
        f"{text}\nDOES NOT FIT: {gib(memory.total)} of {gib(plan.room)} on {plan.device}. Ways out: more ranks a model "
        f"(layout.tp, layout.pp), layout.recompute, a smaller batch.micro, a device with more memory"
    )


def _device(plan: Plan) -> str:
    dtype = plan.cfg.run.dtype
    if plan.peak is None:
        return f"{plan.device}, {dtype}; peak unknown, mfu n/a"
    return f"{plan.device}, {dtype}, dense peak {scaled(plan.peak)}FLOP/s = 100% mfu"


def counted(number: int, thing: str) -> str:
    """A number of things: "1 replica", "12 micro-batches"."""
    return f"{number:,} {thing}{'' if number == 1 else 'es' if thing.endswith('ch') else 's'}"


def scaled(value: float) -> str:
    """Four digits and the prefix of a unit: "854.4 M", "3.2 T"."""
    for power, prefix in enumerate(("", "k", "M", "G", "T", "P", "E", "Z", "Y")):
        if value < 1000 * 1000**power:
            return f"{value / 1000**power:.4g} {prefix}"
    return f"{value:.4g} "


def gib(size: float) -> str:
    """Bytes, three digits, in the largest binary unit that keeps them at or above 1: "1.39 GiB"."""
    for power, unit in enumerate(("B", "KiB", "MiB")):
        if size < 1000 * 1024**power:
            return f"{size / 1024**power:.3g} {unit}"
    return f"{size / 1024**3:.3g} GiB" if size < 1000 * 1024**3 else f"{size / 1024**3:,.0f} GiB"
