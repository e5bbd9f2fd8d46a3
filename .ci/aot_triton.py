"""Compiles every Triton kernel ahead of time, without a GPU, and compares what it needs with the committed table.

    python .ci/aot_triton.py                             compare with tests/triton/aot_table.json
    python .ci/aot_triton.py --update                    write the table, but for what is accepted
    python .ci/aot_triton.py --cases attention --arch 90

It fails when a kernel does not compile, spills more than the table accepts (with a reason), needs more shared memory
than the architecture has, or differs from the table.

The launch functions themselves are called, on meta tensors of real sizes; what they would launch is recorded and
compiled for each architecture, so that the table shows the block sizes and warps that run. Registers and stack come
from the cubin. Registers may differ between Triton's releases: with another release than the table's, only spills and
shared memory beyond the architecture's limit count.
"""

import argparse
import contextlib
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megapre.kernels.triton import (
    activation,
    adamw,
    adamw_stochastic,
    attention,
    attention_backward,
    cross_entropy,
    grad_norm,
    linear_cross_entropy,
    norm,
    rope,
    vocab_parallel,
)

TABLE = Path(__file__).parent.parent / "tests" / "triton" / "aot_table.json"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norms(width: int) -> None:
    x, weight = empty(8192, width), empty(width)
    for centred in (False, True):
        bias = weight if centred else None
        for residual in (None, x):
            _, _, mean, rstd = norm.forward(x, weight, bias, 1e-5, residual, centred)
            norm.backward(x, residual, x, weight, mean, rstd, centred, centred)


def cross_entropies(vocab: int) -> None:
    logits, labels = empty(4096, vocab), empty(4096, dtype=torch.int64)
    for smoothing in (0.0, 0.1):
        settings = (-100, smoothing, 1e-4, vocab - 47)
        losses, lse = cross_entropy.forward(logits, labels, *settings)
        cross_entropy.forward_in_place(logits, labels, losses, *settings)
        cross_entropy.gradient(losses, logits, labels, lse, *settings)
        part = vocab_parallel.local(logits, labels, vocab, 2 * vocab, -100, smoothing != 0)
        vocab_parallel.merge(torch.stack([part, part]), labels, 2 * vocab, -100, smoothing, 0.0)


def linear_cross_entropies() -> None:
    x, labels = empty(8192, 768), empty(8192, dtype=torch.int64)
    linear_cross_entropy.forward_chunks(x, empty(128256, 768), labels, -100, 0.0, 0.0, 128256, True, True)


def ropes(heads: int, k_heads: int, head_dim: int) -> None:
    q, k = empty(2, 4096, heads, head_dim), empty(2, 4096, k_heads, head_dim)
    table = empty(4096, head_dim // 2, dtype=torch.float32)
    for interleaved in (False, True):
        rope.rotate(q, k, table, table, None, interleaved)
        rope.rotate(q, k, table, table, empty(2, 4096, dtype=torch.int64), interleaved, backward=True, in_place=True)


def activations(width: int) -> None:
    x, y, bias = empty(8192, 2 * width), empty(8192, width), empty(width)
    for kind in (activation.SILU.value, activation.GELU_TANH.value):
        activation.gated_forward(x, kind)
        activation.gated_backward(y, x, kind)
    for kind in (activation.GELU_TANH.value, activation.GELU_ERF.value):
        for b in (None, bias):
            activation.gelu_forward(y, b, kind)
            activation.gelu_backward(y, y, b, kind)


def optimizers() -> None:
    state = empty(1 << 26, dtype=torch.float32)
    scalars, numbers = [empty(dtype=torch.float32)] * 4, (0.9, 0.95, 1e-8, 0.1)
    for param, grad in ((empty(1 << 26), empty(1 << 26)), (empty(1 << 26), state), (state, state)):
        adamw.step_(param, state, state, state, grad, *scalars, *numbers)
        grad_norm.norm([grad])
    for moments in (state, empty(1 << 26)):
        adamw_stochastic.step_(empty(1 << 26), moments, moments, empty(1 << 26), *scalars, *numbers, 1 << 40, 0)


def attentions(head_dim: int, dtype: torch.dtype) -> None:
    q = empty(2, 4096, 32, head_dim, dtype=dtype)
    k = empty(2, 4096, 8, head_dim, dtype=dtype)
    cu_seqlens = empty(17, dtype=torch.int32)
    masks: list[tuple[bool, torch.Tensor | None, int | None]] = [(True, None, None), (True, cu_seqlens, None)]
    if head_dim == 128:
        masks += [(True, None, 1024), (False, None, None)]
    for causal, documents, window in masks:
        o, lse, bounds = attention.forward_with_documents(q, k, k, causal, documents, window, 0.1)
        attention_backward.backward(o, None, q, k, k, o, lse, bounds, causal, window, 0.1)


def ones() -> None:
    """Everything of size 1. Triton makes a constant of an argument that is 1, and what is done with it must allow that;
    the interpreter makes none."""
    x, weight, label = empty(1, 1), empty(1), empty(1, dtype=torch.int64)
    for centred in (False, True):
        _, _, mean, rstd = norm.forward(x, weight, weight, 1e-5, x, centred)
        norm.backward(x, x, x, weight, mean, rstd, centred, centred)
    for smoothing in (0.0, 0.1):
        losses, lse = cross_entropy.forward(x, label, -100, smoothing, 0.0, 1)
        cross_entropy.forward_in_place(x, label, losses, -100, smoothing, 0.0, 1)
        cross_entropy.gradient(losses, x, label, lse, -100, smoothing, 0.0, 1)
        vocab_parallel.merge(
            vocab_parallel.local(x, label, 0, 1, -100, smoothing != 0)[None], label, 1, -100, smoothing, 0.0
        )
    q, table = empty(1, 1, 1, 2), empty(1, 1, dtype=torch.float32)
    rope.rotate(q, q, table, table, None, False)
    rope.rotate(q, q, table, table, empty(1, 1, dtype=torch.int64), True, backward=True)
    activation.gated_backward(x, empty(1, 2), activation.SILU.value)
    activation.gelu_backward(activation.gelu_forward(x, weight, 1), x, weight, activation.GELU_ERF.value)
    state, scalars, numbers = empty(1, dtype=torch.float32), [empty(dtype=torch.float32)] * 4, (0.9, 0.95, 1e-8, 0.1)
    adamw.step_(weight, state, state, state, weight, *scalars, *numbers)
    adamw_stochastic.step_(weight, state, state, weight, *scalars, *numbers, 1, 129)
    grad_norm.norm([weight])
    q, cu_seqlens = empty(1, 1, 1, 16), empty(2, dtype=torch.int32)
    for causal, documents, window in ((True, None, None), (False, cu_seqlens, 1)):
        o, lse, bounds = attention.forward_with_documents(q, q, q, causal, documents, window, 1.0)
        attention_backward.backward(o, lse, q, q, q, o, lse, bounds, causal, window, 1.0)


CASES: dict[str, Callable[[], None]] = {
    **{f"norm {width}": lambda width=width: norms(width) for width in (128, 4096, 12288, 32768)},
    **{f"cross_entropy {vocab}": lambda vocab=vocab: cross_entropies(vocab) for vocab in (50304, 131072)},
    "linear_cross_entropy": linear_cross_entropies,
    "rope 32+8x128": lambda: ropes(32, 8, 128),
    "rope 12+12x64": lambda: ropes(12, 12, 64),
    **{f"activation {width}": lambda width=width: activations(width) for width in (14336,)},
    "optimizer": optimizers,
    **{f"attention {d}": lambda d=d: attentions(d, torch.bfloat16) for d in (64, 96, 128, 256)},
    "attention 128 fp32": lambda: attentions(128, torch.float32),
    "sizes of 1": ones,
}

Launch = tuple[JITFunction, dict[str, Any], dict[str, Any]]


@contextlib.contextmanager
def recording(launches: list[Launch]) -> Iterator[None]:
    """Inside, a launch is written down instead of made."""
    original = JITFunction.run

    def record(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in fn.params]
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        launches.append((fn, values, {k: v for k, v in kwargs.items() if k not in names}))

    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = original


def specialize(fn: JITFunction, values: dict[str, Any]) -> tuple[dict[str, Any], dict, dict]:
    """(signature, constants, attributes) as Triton makes them from the arguments of a launch; of the members of a tuple
    as of arguments."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def form(value: Any, place: tuple[int, ...], parameter: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(form(member, (*place, index), parameter) for index, member in enumerate(value)))
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[place] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and not parameter.do_not_specialize:
            attributes[place] = [["tt.divisibility", 16]]
        return "i64" if abs(value) >= 2**31 else "i32"

    signature = {p.name: form(values[p.name], (index,), p) for index, p in enumerate(fn.params)}
    return signature, constants, attributes


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and of tuples their members."""
    for value in values:
        yield from flat(value) if isinstance(value, tuple) else (value,)


def label_of(fn: JITFunction, values: dict[str, Any], options: dict[str, Any]) -> str:
    """The kernel with its constants, the arguments left out and the dtype of its first tensor: what tells its compiled
    forms apart."""
    dtype = str(next(v.dtype for v in flat(values.values()) if isinstance(v, torch.Tensor))).removeprefix("torch.")
    flags = [
        (p.name if values[p.name] is True else f"{p.name}={values[p.name]}")
        for p in fn.params
        if values[p.name] is None or (p.is_constexpr and values[p.name] is not False)
    ]
    return f"{fn.__name__}[{dtype} {' '.join([*flags, *(f'{k}={v}' for k, v in sorted(options.items()))])}]"


def measure(arch: int, launch: Launch) -> dict[str, Any]:
    """Registers a thread, stack (spills) and shared memory in bytes; {"error": ...} when it does not compile."""
    fn, values, options = launch
    signature, constants, attributes = specialize(fn, values)
    source = ASTSource(fn, signature, constexprs=constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is this case's result
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": numbers["REG"],
        "spill": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def compile_case(job: tuple[str, int]) -> dict[str, dict[str, Any]]:
    """{label: numbers} of all launches of one case for one architecture."""
    name, arch = job
    launches: list[Launch] = []
    with recording(launches):
        CASES[name]()
    distinct = {label_of(*launch): launch for launch in launches}
    return {f"sm_{arch} {name}: {label}": measure(arch, launch) for label, launch in distinct.items()}


def problems(rows: dict[str, dict[str, Any]], table: dict[str, Any], same_triton: bool) -> list[str]:
    """What is wrong: an error, a spill without a reason, too much shared memory, or a difference from the table."""
    found = []
    for label, row in rows.items():
        arch = int(label.split(" ", 1)[0].removeprefix("sm_"))
        accepted = max(
            (rule["bytes"] for pattern, rule in table["accepted"].items() if fnmatch.fnmatchcase(label, pattern)),
            default=0,
        )
        if "error" in row:
            found.append(f"{label}: {row['error']}")
        elif row["spill"] > accepted:
            found.append(f"{label}: spills {row['spill']} bytes a thread, {accepted} are accepted in {TABLE.name}")
        elif row["shared"] > SHARED_LIMIT[arch]:
            found.append(f"{label}: {row['shared']} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
        elif same_triton and table["rows"].get(label) != row:
            found.append(f"{label}: {row}, the table has {table['rows'].get(label)}; run with --update if it is meant")
    return found


def assembler(arch: int) -> str:
    """The release of the ptxas that Triton brings for an architecture; registers are its choice."""
    return re.search(r"release \S+ (V\S+)", nvidia.get_ptxas_version(arch))[1]


def written(table: dict[str, Any]) -> str:
    """The table as JSON, a row a line."""
    rows = ",\n".join(f"  {json.dumps(label)}: {json.dumps(row)}" for label, row in table["rows"].items())
    head = json.dumps({key: value for key, value in table.items() if key != "rows"}, indent=1)
    return head.removesuffix("\n}") + f',\n "rows": {{\n{rows}\n }}\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(name, arch) for arch in arguments.arch for name in CASES if arguments.cases in name]
    rows: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(compile_case, jobs):
            rows |= result
            for label, row in result.items():
                print(
                    row.get("error") or "{registers:4d} registers {spill:5d} spill {shared:7d} shared".format(**row),
                    label,
                )
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": "", "accepted": {}, "rows": {}}
    if arguments.update:
        table["triton"] = triton.__version__
        table["ptxas"] = {f"sm_{arch}": assembler(arch) for arch in (80, 90, 100)}
        table["rows"] = table["rows"] | rows if arguments.cases or len(arguments.arch) < 3 else rows
        TABLE.write_text(written(table))
    same_triton = table["triton"] == triton.__version__
    if not same_triton:
        print(f"the table is of Triton {table['triton']}, this is {triton.__version__}: registers are not compared")
    print("ptxas", *(f"{assembler(arch)} for sm_{arch}" for arch in arguments.arch))
    found = problems(rows, table, same_triton)
    if not arguments.cases and len(arguments.arch) == 3:
        found += [f"{label}: in the table, but nothing launches it now" for label in table["rows"].keys() - rows.keys()]
    print(*found, f"{len(rows)} kernels compiled, {len(found)} problems", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
