"""The arithmetic a config must obey: one function a rule, yielding a line for each thing that breaks it.

A rule's parameters name the sections it reads, so rules still run on the sections that parsed when another did not.
Each line says what is wrong in numbers, which rule it breaks, and the nearest values that would work.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .schema import Batch, Data, Layout, Model, Optim, Run, Source

Problems = Iterator[str]


def problems(sections: Mapping[str, Any], partial: bool = False) -> list[str]:
    """What is wrong with the sections at hand; empty means nothing is.

    partial: sections may lack attributes (knobs that did not parse); a rule that reads one is passed over.
    """
    found: list[str] = []
    for rule in RULES:
        wanted = tuple(inspect.signature(rule).parameters)
        if all(name in sections for name in wanted):
            with contextlib.suppress(AttributeError) if partial else contextlib.nullcontext():
                found += rule(*(sections[name] for name in wanted))
    return found


def near_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` on either side of `value`, as text."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if 0 < below != above else f"{above}"


def near_divisors(value: int, wish: int, count: int = 2) -> str:
    """The divisors of `value` nearest to `wish` by ratio, as text, smallest first."""
    return _nearest(_divisors(value), wish, count)


def _nearest(candidates: Iterable[int], wish: int, count: int = 2) -> str:
    nearest = sorted(candidates, key=lambda number: (abs(math.log(number / wish)), number))[:count]
    return " or ".join(str(number) for number in sorted(nearest))


def batch_division(micro: int, total: int, dp: int) -> str | None:
    """Why a global batch of `total` sequences cannot be cut into micro-batches over `dp` ranks, or None."""
    unit = micro * dp
    if total % unit == 0:
        return None
    ways = [f"global {near_multiples(total, unit)}"]
    if total % dp == 0:
        ways.append(f"micro {near_divisors(total // dp, micro)}")
    if total % micro == 0:
        ways.append(f"dp {near_divisors(total // micro, dp)}")
    return (
        f"batch: global = {total} sequences cannot be cut into micro-batches of micro*dp = {micro}*{dp} = {unit} "
        f"({total} % {unit} = {total % unit}); nearest: {', '.join(ways)}"
    )


def _divisors(value: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return sorted({*small, *(value // d for d in small)})


def _heads(model: "Model") -> Problems:
    if model.head_dim == 0:
        yield (
            f"model: hidden = {model.hidden} is not a whole number of heads = {model.heads} "
            f"({model.hidden} % {model.heads} = {model.hidden % model.heads}); nearest: "
            f"hidden {near_multiples(model.hidden, model.heads)}, heads {near_divisors(model.hidden, model.heads)}, "
            f"or set head_dim"
        )
    if model.heads % model.kv_heads:
        yield (
            f"model: heads = {model.heads} cannot share kv_heads = {model.kv_heads} evenly "
            f"({model.heads} % {model.kv_heads} = {model.heads % model.kv_heads}); nearest: "
            f"kv_heads {near_divisors(model.heads, model.kv_heads)}, "
            f"heads {near_multiples(model.heads, model.kv_heads)}"
        )


def _ffn(model: "Model") -> Problems:
    if model.ffn == 0:
        nearest = -(-8 * model.hidden // 3 // 256) * 256
        yield (
            f"model: ffn is needed for family {model.family!r} (no rule gives it); the usual 8/3 * hidden = "
            f"{8 * model.hidden / 3:.0f}, in multiples of 256, is {nearest}"
        )


def _positions(model: "Model") -> Problems:
    if model.positions == "rope" and model.head_dim % 2:
        yield (
            f"model: head_dim = {model.head_dim} is odd, but rope turns features in pairs; nearest: head_dim "
            f"{near_multiples(model.head_dim, 2)}"
        )
    scaling = model.rope_scaling
    if scaling is None:
        return
    if model.positions != "rope":
        yield f"model: rope_scaling needs positions = 'rope', but positions = {model.positions!r}; remove one"
    if scaling.type != "llama3":
        return
    if scaling.original_context == 0:
        yield (
            f"model.rope_scaling: type 'llama3' needs original_context, the context of pretraining; context / factor "
            f"= {model.context}/{scaling.factor:g} = {model.context / scaling.factor:g}"
        )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"model.rope_scaling: low_freq_factor = {scaling.low_freq_factor:g} must be below high_freq_factor = "
            f"{scaling.high_freq_factor:g}; Llama 3.1 has 1 and 4"
        )


def _vocab(model: "Model") -> Problems:
    if model.vocab == 1:
        yield "model: vocab = 1 leaves nothing to predict; use 0 (that of the data's tokenizer) or at least 2"


def _sequence(model: "Model", batch: "Batch") -> Problems:
    if batch.seq_length > model.context:
        yield (
            f"batch: seq_length = {batch.seq_length} is longer than model.context = {model.context} positions; "
            f"nearest: seq_length {model.context}, model.context {batch.seq_length}"
        )


def _stages(model: "Model", layout: "Layout") -> Problems:
    chunks = layout.pp * layout.vpp
    if layout.vpp > 1 and layout.pp == 1:
        yield (
            f"layout: vpp = {layout.vpp} chunks a rank need a pipeline to interleave in, but pp = 1; "
            f"nearest: vpp 1, pp {next(d for d in [*_divisors(model.layers), 2] if d > 1)}"
        )
    if layout.stages:
        if layout.balance:
            yield "layout: stages and balance are both given, and balance chooses stages; remove one"
        given, total = len(layout.stages), sum(layout.stages)
        if given != chunks or total != model.layers:
            yield (
                f"layout: stages = {list(layout.stages)} are {given} stages of {total} layers, but pp*vpp = "
                f"{layout.pp}*{layout.vpp} = {chunks} stages have model.layers = {model.layers}; nearest: "
                f"{_even(model.layers, chunks)}"
            )
        return
    if model.layers % chunks == 0 or (layout.balance and model.layers >= chunks):
        return
    pairs = [(pp, vpp) for pp in _divisors(model.layers) for vpp in _divisors(model.layers // pp) if pp > 1 or vpp == 1]
    pairs.sort(key=lambda pair: (abs(math.log(pair[0] / layout.pp)) + abs(math.log(pair[1] / layout.vpp)), pair))
    ways = [f"model.layers {near_multiples(model.layers, chunks)}", *(f"pp={pp} vpp={vpp}" for pp, vpp in pairs[:3])]
    yield (
        f"layout: {model.layers} layers cannot be cut into pp*vpp = {layout.pp}*{layout.vpp} = {chunks} equal chunks "
        f"({model.layers} % {chunks} = {model.layers % chunks}); nearest: {', '.join(ways)}"
        f"{', or balance=true for unequal ones' if model.layers > chunks else ''}"
    )


def _even(layers: int, stages: int) -> str:
    """The cut into stages that is nearest to equal, as text, where there is one."""
    if layers < stages:
        return f"model.layers {stages}"
    return f"stages {[layers // stages + (stage < layers % stages) for stage in range(stages)]}"


CHUNKS: Mapping[str, tuple[int, float]] = {
    "gpipe": (1, math.inf),
    "1f1b": (1, 1),
    "interleaved": (2, math.inf),
    "breadth_first": (1, math.inf),
    "zb_h1": (1, 1),
    "zbv": (2, 2),
    "dualpipev": (2, 2),
}
"""The schedules that have a name, and the chunks a rank that they have an order for, at least and at most."""


def _schedule(layout: "Layout", batch: "Batch") -> Problems:
    name, pp, vpp = layout.schedule, layout.pp, layout.vpp
    least, most = CHUNKS.get(name, (1, math.inf))
    if not least <= vpp <= most:
        others = [other for other, (low, high) in CHUNKS.items() if low <= vpp <= high and not low == 1 < high]
        exactly = "at least" if most == math.inf else "exactly"
        yield (
            f"layout: schedule {name!r} needs {exactly} {least} chunk{'s' if least > 1 else ''} a rank, but vpp = "
            f"{vpp}; nearest: vpp {least}, schedule {' or '.join(others)}"
        )
    if name == "zb_h1" and pp == 1:
        yield "layout: schedule 'zb_h1' fills the bubble of a pipeline, but pp = 1; nearest: schedule 1f1b, pp 2"
    unit = batch.micro * (layout.dp or 1)
    if name == "dualpipev" and batch.global_ // unit < 2 * pp:
        yield (
            f"layout: schedule 'dualpipev' needs 2*pp = 2*{pp} = {2 * pp} micro-batches or more, but global/(micro*dp) "
            f"= {batch.global_}/({batch.micro}*{layout.dp or 1}) = {batch.global_ // unit}; nearest: batch.global "
            f"{2 * pp * unit}, schedule zbv"
        )
    if layout.group and name != "interleaved":
        yield f"layout: group = {layout.group} is for schedule 'interleaved', not {name!r}; nearest: group 0"
    elif 0 < layout.group < min(pp, batch.global_ // unit):
        yield (
            f"layout: group = {layout.group} micro-batches are fewer than pp = {pp} ranks, and the next chunk would "
            f"wait for them; nearest: group {pp}, or 0 (the fewest that work)"
        )


def _recompute(layout: "Layout") -> Problems:
    for name, given in (("recompute_layers", layout.recompute_layers), ("recompute_group", layout.recompute_group - 1)):
        if given and "block" not in layout.recompute:
            yield (
                f"layout: {name} = {getattr(layout, name)} is for recompute = ['block'], but that is "
                f"{list(layout.recompute)}; nearest: recompute block, or {name} {1 if name.endswith('group') else 0}"
            )


def _tensor(model: "Model", layout: "Layout") -> Problems:
    tp = layout.tp
    for name, value in (("heads", model.heads), ("ffn", model.ffn)):
        if value % tp:
            yield (
                f"layout: tp = {tp} does not divide model.{name} = {value} ({value} % {tp} = {value % tp}); "
                f"nearest: tp {near_divisors(value, tp)}, model.{name} {near_multiples(value, tp)}"
            )
    kv = model.kv_heads
    if kv % tp and tp % kv:
        ranks = _nearest((n for n in _divisors(model.heads) if n % kv == 0 or kv % n == 0), tp)
        heads = _nearest((n for n in _divisors(model.heads) if n % tp == 0 or tp % n == 0), kv)
        yield (
            f"layout: tp = {tp} neither divides model.kv_heads = {kv} nor is a multiple of it (then several ranks "
            f"would hold each); nearest: tp {ranks}, model.kv_heads {heads}"
        )
    if model.vocab_padded % tp:
        yield (
            f"layout: tp = {tp} does not divide the padded vocabulary {model.vocab_padded} (model.vocab = "
            f"{model.vocab} rounded up to a multiple of 128; {model.vocab_padded} % {tp} = {model.vocab_padded % tp});"
            f" nearest: tp {near_divisors(model.vocab_padded, tp)}"
        )


def _sequence_parallel(batch: "Batch", layout: "Layout") -> Problems:
    tp, length = layout.tp, batch.seq_length
    if layout.overlap_products and (tp == 1 or not layout.sequence_parallel):
        yield (
            f"layout: overlap_products needs tp > 1 and sequence_parallel, whose gathers and scatters it overlaps, but "
            f"tp = {tp} and sequence_parallel = {str(layout.sequence_parallel).lower()}; nearest: "
            f"overlap_products=false, {'tp 2' if tp == 1 else 'sequence_parallel=true'}"
        )
    if layout.sequence_parallel and length % tp:
        yield (
            f"layout: sequence_parallel cuts {length} tokens over tp = {tp} ({length} % {tp} = {length % tp}); "
            f"nearest: batch.seq_length {near_multiples(length, tp)}, sequence_parallel=false"
        )


def _context(layout: "Layout") -> Problems:
    if layout.cp > 1:
        yield (
            f"layout: cp = {layout.cp} cuts each sequence over ranks, but no attention here reads keys of another "
            f"rank; nearest: cp 1, with tp {layout.tp * layout.cp} or dp {max(layout.dp, 1) * layout.cp} in its place"
        )


class Attends(NamedTuple):
    """What an implementation of attention takes: heads up to `most` features, multiples of `multiple`; whether fp32."""

    most: int = 256
    multiple: int = 1
    fp32: bool = False


ATTENTION: Mapping[str, Attends] = {
    "native": Attends(fp32=True),
    "triton": Attends(fp32=True),
    "cuda": Attends(multiple=8),
    "cudnn": Attends(most=128, multiple=8),
    "flash": Attends(),
    "flash_attention_2": Attends(),
    "flash_attention_3": Attends(),
}
"""Those of megapre.kernels (`Implementation.takes`) that refuse some heads; they would do so in the first step."""


def _attention(model: "Model", run: "Run", kernels: "Mapping[str, str]") -> Problems:
    name, size = kernels.get("attention", "sdpa" if run.device == "cuda" else "native"), model.head_dim
    takes = ATTENTION.get(name)
    if takes is None:
        return
    if size > takes.most:
        yield (
            f"model: head_dim = {size} is more than the {takes.most} features that {name} attention takes; nearest: "
            f"head_dim {takes.most}, kernels.attention=sdpa"
        )
    elif size % takes.multiple:
        yield (
            f"model: head_dim = {size} is no multiple of {takes.multiple}, as {name} attention needs ({size} % "
            f"{takes.multiple} = {size % takes.multiple}); nearest: head_dim {near_multiples(size, takes.multiple)}, "
            f"kernels.attention=sdpa"
        )
    if run.dtype == "fp32" and not takes.fp32:
        yield (
            f"run: dtype = 'fp32', but {name} attention takes fp16 and bf16 alone; nearest: run.dtype bf16, "
            f"kernels.attention=sdpa"
        )


def _batch(batch: "Batch", layout: "Layout") -> Problems:
    if problem := batch_division(batch.micro, batch.global_, layout.dp or 1):
        yield problem


def _rate(optim: "Optim") -> Problems:
    if optim.min_lr > optim.lr:
        yield f"optim: min_lr = {optim.min_lr:g} is above lr = {optim.lr:g}; nearest: min_lr {optim.lr:g}, or 0"


def _precision(optim: "Optim", run: "Run") -> Problems:
    if optim.loss_scale and run.dtype != "fp16":
        yield (
            f"optim: loss_scale = {optim.loss_scale:g} is for run.dtype = 'fp16', but that is {run.dtype!r}, whose "
            f"range needs none; nearest: loss_scale 0, run.dtype fp16"
        )
    if optim.master == "none" and run.dtype != "bf16":
        kept = "fp32 weights are their own master" if run.dtype == "fp32" else "fp16 weights need one"
        yield (
            f"optim: master = 'none' is for run.dtype = 'bf16', but that is {run.dtype!r}, and {kept}; nearest: master "
            f"fp32, run.dtype bf16"
        )
    if optim.moments == "bf16" and optim.master != "none":
        yield (
            f"optim: moments = 'bf16' is for bf16 weights without a master, but master = {optim.master!r}; nearest: "
            f"moments fp32, master none"
        )
    if optim.grad_dtype == "bf16" and run.dtype != "bf16":
        yield (
            f"optim: grad_dtype = 'bf16' is for run.dtype = 'bf16', but that is {run.dtype!r}; nearest: grad_dtype "
            f"fp32, run.dtype bf16"
        )


def _lengths(optim: "Optim", run: "Run") -> Problems:
    warmup, decay, steps = optim.warmup_steps, optim.decay_steps, run.steps
    if optim.schedule == "wsd" and decay == 0:
        yield (
            f"optim: schedule 'wsd' needs decay_steps, the length of its final decay; 10% to 20% of run.steps = "
            f"{steps} is {max(1, steps // 10)} to {max(1, steps // 5)}"
        )
    if optim.schedule == "constant" and decay:
        yield f"optim: schedule 'constant' has no decay, but decay_steps = {decay}; nearest: decay_steps 0"
    if warmup + decay > steps:
        sizes = (
            f"warmup_steps + decay_steps = {warmup} + {decay} = {warmup + decay}"
            if decay
            else f"warmup_steps = {warmup}"
        )
        shorter = (
            f"decay_steps {steps - warmup}" if decay and warmup < steps else f"warmup_steps {max(0, steps - decay)}"
        )
        yield f"optim: {sizes} is more than run.steps = {steps}; nearest: run.steps {warmup + decay}, {shorter}"


def _trace(run: "Run") -> Problems:
    if beyond := [step for step in run.trace if step > run.steps]:
        yield f"run: trace = {list(run.trace)} has {beyond} beyond run.steps = {run.steps}; nearest: {run.steps}"


def _split(data: "Data") -> Problems:
    parts = data.split.split(",")
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    if len(weights) != 3 or not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
        yield (
            f"data.split: {data.split!r} is not three weights >= 0, for train, valid and test, with a positive sum; "
            f"for example '969,30,1' or '1,0,0'"
        )


def _blends(data: "Data") -> Problems:
    named = [("data.train", data.train), ("data.valid", data.valid)]
    named += [(f"data.stages.{i}.train", stage.train) for i, stage in enumerate(data.stages)]
    for name, sources in named:
        yield from _blend(name, sources)
    if data.train and data.stages:
        yield "data: train and stages are both given, and stages replace train; remove one"


def _blend(name: str, sources: "tuple[Source, ...]") -> Problems:
    bare = [source.prefix for source in sources if source.weight is None]
    if bare and len(bare) < len(sources):
        yield (
            f"{name}: {len(bare)} of {len(sources)} sources have no weight ({', '.join(bare[:3])}); give each one, or "
            f"none (then every sample is seen once)"
        )
    prefixes = [source.prefix for source in sources]
    for prefix in sorted({p for p in prefixes if prefixes.count(p) > 1}):
        yield f"{name}: {prefix!r} is listed {prefixes.count(prefix)} times; list it once with the summed weight"


def _stage_order(data: "Data", batch: "Batch", run: "Run") -> Problems:
    stages, total = data.stages, batch.tokens * run.steps
    if not stages:
        return
    for i, stage in enumerate(stages):
        if not stage.train:
            yield f"data.stages.{i}: train is empty; name at least one source"
    bounds = [stage.until_tokens for stage in stages]
    if bounds[-1] == 0:
        bounds[-1] = max(total, bounds[-2] + 1 if len(bounds) > 1 else 0)
    for i, (before, after) in enumerate(zip([0, *bounds], bounds, strict=False)):
        if after <= before:
            yield (
                f"data.stages.{i}: until_tokens = {after} is not above {before}, where the stage begins; stages go up, "
                f"and only the last may be 0 (to the end)"
            )
    if bounds[-1] < total:
        yield (
            f"data.stages.{len(stages) - 1}: the last stage ends at until_tokens = {bounds[-1]}, but the run consumes "
            f"global*seq_length*steps = {batch.global_}*{batch.seq_length}*{run.steps} = {total}; nearest: "
            f"until_tokens 0 (to the end), run.steps {bounds[-1] // batch.tokens}"
        )


def _cuda_graph(layout: "Layout", run: "Run") -> Problems:
    if not run.cuda_graph:
        return
    ranks = layout.model_parallel * max(layout.dp, 1)
    if ranks > 1:
        yield (
            f"run: cuda_graph records the step of one rank, but layout has tp*pp*cp*dp = {ranks}; nearest: "
            "cuda_graph false, or tp, pp, cp and dp 1"
        )
    if run.device == "cpu":
        yield "run: cuda_graph needs a CUDA device, but device = 'cpu'; nearest: cuda_graph false, device auto or cuda"


RULES: tuple[Callable[..., Problems], ...] = (
    _heads,
    _ffn,
    _positions,
    _vocab,
    _sequence,
    _stages,
    _schedule,
    _recompute,
    _tensor,
    _sequence_parallel,
    _context,
    _attention,
    _batch,
    _rate,
    _precision,
    _lengths,
    _trace,
    _split,
    _blends,
    _stage_order,
    _cuda_graph,
)
