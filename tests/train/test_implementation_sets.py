"""A model trained 20 steps has the same losses with every implementation of every op, but for rounding.

What rounding may do is measured beside it: the all-reference run is repeated from initial weights each moved by at most
one unit in the last place of its dtype, at random. Two implementations that are right differ by roundings of that size
in each op; what 20 steps of AdamW make of them grows as what they make of such a start. So losses may differ from those
of the all-reference run by FACTOR times the largest distance that the moved starts have reached by that step, and by
FLOOR of the loss itself, the rounding of the loss's own fp32 sum. FACTOR is for what three starts do not show; right
implementations were seen to use up to 0.43 of the bound.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megapre import kernels
from megapre.config import Config
from megapre.data import GlobalBatch, MicroBatch
from megapre.kernels.registry import IMPLEMENTATIONS, OPS
from megapre.train.step import Engine

STEPS, STARTS = 20, 3
FACTOR, FLOOR = 2.0, 2.0**-20
FAMILIES = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "kv_heads": 1, "tied": True},
    "geglu": {"family": "llama", "activation": "geglu", "tied": False},
}
DTYPES = ("fp32", "bf16")
UNUSED = {
    "gpt2": {"rms_norm", "rope", "rope_", "swiglu", "geglu"},
    "llama": {"layer_norm", "gelu", "geglu"},
    "geglu": set(OPS) - {"geglu", "linear"},  # the rest is the llama's
}
ELSEWHERE = {"cross_entropy", "adamw_stochastic_"}  # the loss is linear_cross_entropy's; these runs round to nearest
SWITCHED = [(row.op, row.name) for row in IMPLEMENTATIONS if row.op not in ELSEWHERE and row.name != "reference"]
REFERENCE = dict.fromkeys(OPS, "reference")
LEVELS = {
    "portable": {"MEGAPRE_CPU_LEVEL": "default"},
    "avx2": {"MEGAPRE_CPU_LEVEL": "avx2"},
    "avx512": {"MEGAPRE_CPU_LEVEL": "avx512"},
    "no native library": {"MEGAPRE_NATIVE": "0"},
}
Losses = list[float]


def train(family: str, dtype: str, ops: Mapping[str, str], moved: int = 0) -> Losses:
    """The losses of STEPS steps; `moved` > 0 is the seed by which the initial weights are moved within their ulp."""
    shape = {"layers": 2, "hidden": 48, "heads": 2, "ffn": 80, "vocab": 96, "context": 24}
    run = {"steps": STEPS, "dtype": dtype, "device": "cpu", "seed": 3}
    cfg = Config.model_validate(
        {
            "model": {**shape, **FAMILIES[family]},
            "batch": {"micro": 2, "global": 4, "seq_length": 24},
            "optim": {"lr": 3e-3},
            "run": run,
            "kernels": dict(ops),
        }
    )
    engine = Engine(cfg, torch.device("cpu"))
    generator = torch.Generator().manual_seed(moved)
    for group in engine.flat.groups if moved else ():
        ulp = torch.finfo(group.param.dtype).eps
        group.param.mul_(1 + ulp * (2 * torch.rand(group.param.shape, generator=generator) - 1))
        group.master.copy_(group.param)
    generator.manual_seed(0)
    losses = []
    for _ in range(STEPS):
        # Frequencies as 1 / rank, and each token a little like the one before it: there is something to learn.
        lines = (96 ** torch.rand(2, 2, 25, generator=generator)).long().sub(1).cummax(-1).values
        parts = tuple(MicroBatch(line[:, :-1].contiguous(), line[:, 1:].contiguous(), None, None) for line in lines)
        losses.append(float(engine.step(GlobalBatch(parts, 96, 4), 3e-3).loss))
    return losses


@functools.cache
def expected(family: str, dtype: str) -> tuple[Losses, Losses]:
    """The losses of the all-reference run, and how far another may be from each."""
    losses = train(family, dtype, REFERENCE)
    spread = torch.tensor([train(family, dtype, REFERENCE, moved=seed) for seed in range(1, STARTS + 1)])
    furthest = (spread - torch.tensor(losses)).abs().amax(0).cummax(0).values
    return losses, (FACTOR * furthest + FLOOR * torch.tensor(losses)).tolist()


def check(found: Losses, family: str, dtype: str) -> None:
    losses, bounds = expected(family, dtype)
    assert losses[-1] < losses[0] - 0.3, f"nothing was learned: {losses[0]} to {losses[-1]}"
    for step, (here, there, bound) in enumerate(zip(found, losses, bounds, strict=True), start=1):
        assert abs(here - there) <= bound, f"step {step}: loss {here}, all-reference {there}, bound {bound:.2g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "implementation"), SWITCHED)
def test_one_op_switched(op: str, implementation: str, dtype: str) -> None:
    rows = {(row.op, row.implementation): row.why_not for row in kernels.table("cpu")}
    if why_not := rows[op, implementation]:
        pytest.skip(why_not)
    for family in FAMILIES:
        if op not in UNUSED[family]:
            check(train(family, dtype, {**REFERENCE, op: implementation}), family, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_preferred_of_every_op(family: str, dtype: str) -> None:
    check(train(family, dtype, {}), family, dtype)


@pytest.mark.parametrize("level", LEVELS)
def test_the_preferred_of_every_op_on_other_code_paths(level: str) -> None:
    code = "import json, test_implementation_sets as here; print(json.dumps(here.all_preferred()))"
    folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    clean = {key: value for key, value in os.environ.items() if key not in ("MEGAPRE_CPU_LEVEL", "MEGAPRE_NATIVE")}
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders} | LEVELS[level]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if "this CPU cannot run it" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    for name, losses in json.loads(done.stdout).items():
        check(losses, *name.split())


def all_preferred() -> dict[str, Losses]:
    return {f"{family} {dtype}": train(family, dtype, {}) for family in FAMILIES for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_mistake_is_seen(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention whose output is 5% too small, with which the model learns as well as with the right one."""
    expected("llama", dtype)
    choose = kernels.choose

    def wrong(*arguments: Any) -> kernels.Kernels:
        ops = choose(*arguments)
        return dataclasses.replace(ops, attention=lambda *given, **rest: 0.95 * ops.attention(*given, **rest))

    monkeypatch.setattr(kernels, "choose", wrong)
    with pytest.raises(AssertionError, match="all-reference"):
        check(train("llama", dtype, REFERENCE), "llama", dtype)
