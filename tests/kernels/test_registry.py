"""Choosing implementations, the table of them, cost, and what importing the package does not do."""

import ast
import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre import kernels
from megapre.kernels.cost import ENTRIES, cost, pairs

ROOT = Path(__file__).resolve().parents[2]
# Where an op's header is, unless in a file of its name.
FILES = {
    "rope_": "rope.py",
    "geglu": "swiglu.py",
    "adamw_": "adamw.py",
    "adamw_stochastic_": "adamw.py",
}
# The op of a file of Triton kernels, unless it has its name.
TRITON_FILES = {
    "adamw": "adamw_",
    "adamw_stochastic": "adamw_stochastic_",
    "attention_backward": "attention",
    "vocab_parallel": "vocab_parallel_linear_cross_entropy",
}


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_names_every_implementation_once_and_chooses_one_an_op() -> None:
    rows = kernels.table("cpu")
    assert len({(row.op, row.implementation) for row in rows}) == len(rows)
    chosen = {row.op: row.implementation for row in rows if row.chosen}
    assert chosen == kernels.choose("cpu").names
    assert all(row.available or row.why_not for row in rows) and not any(row.available and row.why_not for row in rows)
    # A reference runs everywhere: no compiler and no GPU is needed for any op.
    references = {row.op for row in rows if row.implementation == "reference" and row.available}
    assert references == set(chosen)


def test_what_has_not_run_on_a_gpu_says_so_in_the_table_and_in_its_header() -> None:
    rows = kernels.registry.IMPLEMENTATIONS
    whys = {(row.op, row.implementation): row.why for row in kernels.table("cpu")}
    for row in rows:
        own, others = ROOT / "kernels", row.function.__module__.startswith("megapre.kernels.third_party")
        if row.name == "cuda" or others:
            assert "not yet run on a GPU" in row.note, f"{row.op} {row.name}"
        assert row.note in whys[row.op, row.name]
        home = own / "third_party" / "__init__.py" if others else own / FILES.get(row.op, f"{row.op}.py")
        if row.note:
            header = ast.get_docstring(ast.parse(home.read_text())) or ""
            assert re.search(r"(not yet run on a GPU|None of these rows has run on a GPU yet)", header), home
    notes = {row.op: row.note for row in rows if row.name == "triton"}
    for path in (ROOT / "kernels" / "triton").glob("*.py"):
        if "ot yet run on a GPU" in (ast.get_docstring(ast.parse(path.read_text())) or ""):
            assert "not yet run on a GPU" in notes[TRITON_FILES.get(path.stem, path.stem)], path
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert "// Not yet run on a GPU; proven by tests/cuda/.\n" in path.read_text(), path


def test_an_override_is_honoured_or_refused() -> None:
    for row in kernels.table("cpu"):
        if row.available:
            assert kernels.choose("cpu", {row.op: row.implementation}).names[row.op] == row.implementation
        else:
            with pytest.raises(kernels.KernelUnavailable, match=f"'{row.implementation}' cannot run on cpu"):
                kernels.choose("cpu", {row.op: row.implementation})
    with pytest.raises(kernels.KernelUnavailable, match=r"'cuda' cannot run on cpu: .* need a CUDA device, and a"):
        kernels.choose("cpu", {"rms_norm": "cuda"})
    assert kernels.choose("cpu:0").names == kernels.choose("cpu").names
    available = "available on cpu: (native, )?sdpa, reference"
    with pytest.raises(kernels.KernelUnavailable, match=f"no implementation 'fastest'; {available}"):
        kernels.choose("cpu", {"attention": "fastest"})
    with pytest.raises(kernels.KernelUnavailable, match="no op softmax; the ops are "):
        kernels.choose("cpu", {"softmax": "reference"})
    with pytest.raises(kernels.KernelUnavailable, match="device is 'tpu'"):
        kernels.choose("tpu")


def test_kernels_are_frozen_and_travel() -> None:
    ops = kernels.choose("cpu", {"rope": "reference"})
    with pytest.raises(AttributeError):
        ops.rope = None  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(ops)) == ops == copy.deepcopy(ops)


def test_importing_costs_nothing_and_cost_needs_no_torch() -> None:
    code = (
        "import sys; import megapre.kernels; from megapre.kernels.cost import cost; "
        "cost('rope', {'T': 1, 'N': 1, 'K': 1, 'D': 2}, 'bf16'); "
        "assert 'torch' not in sys.modules and 'megapre.kernels.registry' not in sys.modules"
    )
    python(code)


def test_importing_the_registry_registers_and_loads_nothing() -> None:
    code = (
        "import megapre.kernels.registry, torch; "
        "assert not hasattr(torch.ops.megapre, 'linear_cross_entropy'); "
        "assert not any('megapre' in p for p in torch.ops.loaded_libraries); "
        "from megapre import kernels; kernels.choose('cpu'); kernels.choose('cpu'); kernels.table('cpu'); "
        "assert hasattr(torch.ops.megapre, 'linear_cross_entropy')"
    )
    python(code)


def test_everything_runs_without_the_native_library() -> None:
    code = """
import torch
from megapre import kernels
rows = {(row.op, row.implementation): row for row in kernels.table("cpu")}
assert not rows["rms_norm", "native"].available and "MEGAPRE_NATIVE" in rows["rms_norm", "native"].why_not
ops = kernels.choose("cpu")
assert "native" not in ops.names.values()
x, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
labels = torch.tensor([1, 2, -100, 10, 0])
ref = kernels.choose("cpu", {"linear_cross_entropy": "reference"})
results = [(loss, *torch.autograd.grad(loss, [x, w])) for loss in
           (o.linear_cross_entropy(x, w, labels, vocab=11) for o in (ops, ref))]
for a, b in zip(*results): torch.testing.assert_close(a, b)
y, h, rstd = torch.ops.megapre.rms_norm(x, torch.ones(8), 1e-6, None)
torch.testing.assert_close(y, ops.rms_norm(x, torch.ones(8)))
torch.library.opcheck(torch.ops.megapre.rms_norm, (x, torch.ones(8, requires_grad=True), 1e-6, x))
torch.library.opcheck(torch.ops.megapre.cross_entropy, (x, labels.clamp(max=6), -100, 0.1, 1e-3, 7))
torch.library.opcheck(torch.ops.megapre.cross_entropy_, (x.detach(), labels.clamp(max=6), None, -100, 0.1, 1e-3, 7))
"""
    python(code, MEGAPRE_NATIVE="0")


SIZES = {"T": 8, "H": 16, "F": 16, "V": 32, "B": 2, "S": 4, "N": 4, "K": 2, "D": 8, "P": 100, "I": 16, "O": 8}


def test_every_op_has_a_cost() -> None:
    ops = set(kernels.choose("cpu").names)
    assert {op.removesuffix("_backward") for op in ENTRIES} == ops
    for op in ENTRIES:
        flops, moved = cost(op, SIZES, "bf16")
        assert isinstance(flops, int) and isinstance(moved, int) and moved > 0
        assert flops > 0 or op == "embedding", "a lookup computes nothing, everything else does"
        assert cost(op, SIZES, "fp32")[1] >= moved
    with pytest.raises(ValueError, match="there is no op 'softmax'"):
        cost("softmax", SIZES, "bf16")
    with pytest.raises(ValueError, match="no dtype 'int8'"):
        cost("rope", SIZES, "int8")
    with pytest.raises(ValueError, match="swiglu needs the size 'F'; given are T"):
        cost("swiglu", {"T": 1}, "bf16")


def test_costs_by_hand() -> None:
    assert cost("rms_norm", {"T": 8192, "H": 4096}, "bf16") == (4 * 8192 * 4096, 2 * 2 * 8192 * 4096 + 4 * 8192)
    assert cost("linear_cross_entropy", {"T": 2, "V": 3, "H": 5}, "fp32")[0] == 2 * 2 * 3 * 5 + 5 * 2 * 3
    # A full causal square: S (S + 1) / 2 pairs, two products of 2 D FLOPs each.
    assert cost("attention", {"B": 2, "S": 4, "N": 3, "K": 3, "D": 8}, "bf16")[0] == 2 * 3 * 10 * 4 * 8
    # bf16 gradient in, fp32 master and moments in and out, bf16 parameter out; with fp32 the master is the parameter.
    assert cost("adamw_", {"P": 10}, "bf16")[1] == 10 * (2 + 24 + 2)
    assert cost("adamw_", {"P": 10}, "fp32")[1] == 10 * (4 + 24)
    # fp32 gradient in, bf16 parameter and two moments in and out.
    assert cost("adamw_stochastic_", {"P": 10}, "bf16")[1] == 10 * (4 + 4 + 8)


@given(keys=st.integers(1, 12), cached=st.integers(0, 11), causal=st.booleans(), window=st.integers(0, 14))
def test_visible_pairs_are_counted_exactly(keys: int, cached: int, causal: bool, window: int) -> None:
    queries = max(keys - cached, 1)
    counted = sum(
        (not causal or j <= i + keys - queries) and (not window or abs(i + keys - queries - j) < window)
        for i in range(queries)
        for j in range(keys)
    )
    assert pairs({"Sq": queries, "Sk": keys, "causal": causal, "window": window}) == counted
