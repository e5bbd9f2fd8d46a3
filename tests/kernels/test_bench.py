"""The cases and the timer of `megapre bench kernels`: every op has a case, what is computed from times adds up."""

import time

import pytest
import torch

from megapre import kernels
from megapre.kernels import registry
from megapre.kernels.bench import cases, sets
from megapre.kernels.bench.case import DTYPES
from megapre.kernels.bench.run import Plan, Runner
from megapre.kernels.bench.timer import Ceilings, Timer, quantile
from megapre.kernels.cost import cost

TINY = {"T": 8, "B": 2, "S": 8, "H": 16, "N": 4, "K": 2, "D": 8, "F": 16, "V": 32, "P": 1000}


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("cpu", repeats=3, cold=False)


def test_every_op_of_the_registry_has_a_case() -> None:
    assert set(registry.OPS) <= set(cases.BUILDERS), "add a builder to kernels/bench/cases.py"
    assert set(cases.NEEDS) == set(cases.BUILDERS)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("op", cases.ops())
def test_every_provider_of_every_variant_computes_the_same(runner: Runner, op: str, dtype: str) -> None:
    for sizes in sets.of_sizes(op, TINY):
        rows = runner.case(cases.build(op, sizes, dtype, "cpu"))
        assert rows and not [row.note for row in rows if row.note]
        assert any(row.in_use for row in rows) or op not in registry.OPS
        assert all(row.repeats == 3 for row in rows)


def test_numbers_of_a_row_add_up(runner: Runner) -> None:
    before = len(runner.rows)
    rows = runner.case(cases.build("rms_norm", {**TINY, "residual": 1}, "fp32", "cpu"))
    assert rows == runner.rows[before:] and {row.mode for row in rows} == {"forward", "backward", "full"}
    runner.finish()
    for row in rows:
        sizes = {"T": 8, "H": 16, "residual": 1}
        work = {
            mode: cost(f"rms_norm{part}", sizes, "fp32") for mode, part in (("forward", ""), ("backward", "_backward"))
        }
        work["full"] = (work["forward"][0] + work["backward"][0], work["forward"][1] + work["backward"][1])
        assert row.shape == "T=8,H=16,residual=1"
        assert (row.flops, row.bytes) == work[row.mode]
        assert 0 < row.min_ms <= row.p20_ms <= row.p50_ms <= row.p80_ms and row.best_ms == row.min_ms
        assert row.gb_s == pytest.approx(row.bytes / 1e9 / (row.min_ms / 1e3))
        assert row.tflop_s == pytest.approx(row.flops / 1e12 / (row.min_ms / 1e3))
        assert row.of_ceiling == pytest.approx(row.gb_s / runner.ceilings.best["copy"])
        group = [other for other in rows if other.mode == row.mode]
        fastest = min((other for other in group if other.peer), key=lambda other: other.min_ms)
        assert row.best_peer == fastest.provider and row.ratio == pytest.approx(fastest.min_ms / row.min_ms)


def test_providers_take_turns_and_each_round_begins_with_another() -> None:
    order: list[str] = []
    works = {name: ((lambda name=name: order.append(name)), None) for name in "abc"}
    times = Timer("cpu", cold=False).turns(works, 4)
    assert "".join(order) == "abcbcacababc"
    assert all(len(taken) == 4 for taken in times.values())
    order.clear()
    Timer("cpu", cold=False).turns(works, 9, deadline=time.monotonic())
    assert len(order) == 9, "three rounds are made even when time is up"


def test_preparation_and_emptying_the_caches_are_not_timed() -> None:
    timer = Timer("cpu", cold=True)
    assert timer.milliseconds(lambda: None, lambda: time.sleep(0.05)) < 10


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_in_16_bits_are_held_against_no_less_than_those_in_fp32(dtype: str) -> None:
    timer, ceilings = Timer("cpu", cold=False), Ceilings("cpu")
    for known in (dtype, "fp32"):
        work = ceilings.probe("product", DTYPES[known])
        ceilings.note("product", known, min(timer.turns({"": (work, None)}, 3)[""]))
    assert ceilings.rate("product", dtype) > 0.5 * ceilings.rate("product", "fp32"), "half: times scatter"


def test_quantiles() -> None:
    times = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [quantile(times, at) for at in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])
    assert quantile([7.0], 0.8) == 7.0


def test_a_wrong_and_a_failing_provider_are_reported_and_not_timed(runner: Runner) -> None:
    case = cases.build("gelu", TINY, "fp32", "cpu")
    case.peers = {"flash": lambda x, bias: x + bias, "flex": lambda x, bias: 1 / 0}
    rows = {row.provider: row for row in runner.case(case, ["forward"])}
    assert rows["flash"].note.startswith("wrong: ") and not rows["flash"].repeats
    assert rows["flex"].note == "ZeroDivisionError: division by zero" and not rows["flex"].repeats
    assert rows["torch"].repeats == 3 and rows["torch"].note == ""


def test_a_budget_ends_a_run_between_cases(runner: Runner) -> None:
    plans = [Plan(lambda: cases.build("gelu", TINY, "fp32", "cpu"), ["forward"])] * 3
    assert len(list(runner.run(plans))) == 3
    assert list(runner.run(plans, budget=0.0)) == []


def test_goals_are_held_against_the_implementation_in_use(runner: Runner) -> None:
    used = kernels.choose("cpu").names["rms_norm"]
    case = cases.build("rms_norm", TINY, "bf16", "cpu")
    for factor, met in ((1e-9, True), (1e9, False)):
        rows = {row.provider: row for row in runner.case(case, ["forward"], goals={"forward": ("torch", factor)})}
        assert rows[used].met is met and rows[used].goal == f"{factor:g}x torch"
        assert rows[used].reached == pytest.approx(rows["torch"].min_ms / rows[used].min_ms)
        assert all(row.met is None for name, row in rows.items() if name != used)


def test_mistakes_name_what_there_is() -> None:
    with pytest.raises(cases.BenchError, match=r"no op 'rmsnorm' \(did you mean rms_norm\?\); the ops are "):
        cases.build("rmsnorm", TINY, "bf16", "cpu")
    with pytest.raises(cases.BenchError, match="no dtype 'int8'; the dtypes are bf16, fp16, fp32, fp64"):
        cases.build("gelu", TINY, "int8", "cpu")
    with pytest.raises(cases.BenchError, match="swiglu needs the sizes T, F; given are T, H"):
        cases.build("swiglu", {"T": 1, "H": 2}, "bf16", "cpu")


def test_work_in_place_starts_from_the_same_numbers_each_time() -> None:
    case = cases.build("cross_entropy_", TINY, "fp32", "cpu")
    assert case.prepare is not None
    for name, provider in case.providers().items():
        if provider.why_not or name == "compile":
            continue
        case.prepare()
        first = [t.clone() for t in provider.function()]
        case.prepare()
        for a, b in zip(first, provider.function(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
