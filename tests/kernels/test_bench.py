"""The cases and the timer of `megapre bench kernels`: every op has a case, what is computed from times adds up."""

import time

import pytest
import torch

from megapre import kernels
from megapre.kernels import registry
from megapre.kernels.bench import cases, policies, sets
from megapre.kernels.bench.case import DTYPES
from megapre.kernels.bench.ceilings import Ceilings
from megapre.kernels.bench.exact import TOLERANCE, error, exact
from megapre.kernels.bench.row import Goal, Row, hold
from megapre.kernels.bench.run import Plan, Runner
from megapre.kernels.bench.timer import Timer, quantile
from megapre.kernels.bench.works import prepared
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
        assert any(row.error > 0 for row in rows) or op == "adamw_stochastic_", "it was held against an exact result"


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
    times = Timer(cold=False).turns(works, 4)
    assert "".join(order) == "abcbcacababc"
    assert all(len(taken) == 4 for taken in times.values())
    order.clear()
    Timer(cold=False).turns(works, 9, deadline=time.monotonic())
    assert len(order) == 9, "three rounds are made even when time is up"


def test_preparation_and_emptying_the_caches_are_not_timed() -> None:
    timer = Timer(cold=True)
    assert timer.milliseconds(lambda: None, lambda: time.sleep(0.05)) < 10


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_in_16_bits_are_held_against_no_less_than_those_in_fp32(dtype: str) -> None:
    timer, ceilings = Timer(cold=False), Ceilings("cpu")
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
        rows = runner.case(case, ["forward"])
        runner.finish()
        (held,) = hold(rows, {"forward": (Goal(factor, "torch"),)})
        (row, torch_row) = (next(row for row in rows if row.provider == name) for name in (used, "torch"))
        assert (held.provider, held.in_use, held.met) == (used, True, met) and held.goal == f">= {factor:.3g}x torch"
        assert held.reached == f"{torch_row.min_ms / row.min_ms:.3g}x torch"
    goals = {mode: (Goal(1e-9, "torch"),) for mode in ("forward", "full")}
    of_run = Runner("cpu", repeats=1, cold=False)
    of_run.case(case, goals=goals)
    of_run.finish()
    assert [held.mode for held in of_run.held()] == ["forward", "full"]


def test_each_kind_of_goal_says_what_is_reached() -> None:
    def row(provider: str, best_ms: float, **terms: object) -> Row:
        made = Row("norm", "T=1", "bf16", "forward", provider, provider in ("torch", "cudnn"), provider == "triton")
        made.repeats, made.best_ms = (0 if best_ms == 0 else 9), best_ms
        for name, value in terms.items():
            setattr(made, name, value)
        return made

    rows = [
        row("triton", 2.0, gb_s=3700.0, of_ceiling=0.86, best_peer="cudnn"),
        row("cuda", 0.0, best_peer="cudnn", note="RuntimeError: no"),
        row("torch", 5.0),
        row("cudnn", 2.2),
    ]
    wanted = {
        Goal(3600, "GB/s"): ("3.7e+03 GB/s", True),
        Goal(90, "%"): ("86 %", False),
        Goal(2.0, "ms"): ("2 ms", True),
        Goal(1.9, "ms"): ("2 ms", False),
        Goal(2, "torch"): ("2.5x torch", True),
        Goal(1, "best peer"): ("1.1x best peer", True),
        Goal(1, "flex"): ("", None),
    }
    for goal, (reached, met) in wanted.items():
        ours, ours_in_cuda = hold(rows, {"forward": (goal,)})
        assert (ours.provider, ours.reached, ours.met) == ("triton", reached, met)
        assert (ours_in_cuda.provider, ours_in_cuda.met, ours_in_cuda.verdict) == ("cuda", None, "not measured")
    (named,) = hold(rows, {"forward": (Goal(0.8, "cudnn", held="torch"),), "backward": (Goal(1, "ms"),)})
    assert (named.provider, named.met) == ("torch", False)
    (named,) = hold(rows, {"forward": (Goal(0.8, "cudnn", held="apex"),)})
    assert (named.provider, named.goal, named.met) == ("apex", ">= 0.8x cudnn", None)


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


def test_a_case_that_cannot_be_built_is_a_row_that_says_so() -> None:
    runner = Runner("cpu", repeats=1, cold=False)
    title = ("gelu", "T=8,F=16", "bf16")
    plans = [
        Plan(lambda: 1 / 0, (), {"full": (Goal(2, "ms"),)}, title),
        Plan(lambda: cases.build("gelu", TINY, "fp32", "cpu"), ["forward"]),
    ]
    first, second = runner.run(plans)
    (row,) = first
    assert (row.op, row.shape, row.dtype, row.note) == (*title, "ZeroDivisionError: division by zero")
    assert all(row.repeats for row in second) and runner.finish() == [*first, *second]
    (held,) = runner.held()
    assert (held.op, held.shape, held.goal, held.verdict) == ("gelu", "T=8,F=16", "<= 2 ms", "not measured")


def test_what_is_compared_reaches_the_last_rows() -> None:
    """An index that overflows shows there; NaN anywhere in them is infinitely far off, as is one in any loss."""
    case = cases.build("cross_entropy_", {"T": 100, "V": 32}, "fp32", "cpu")
    known = exact(case)
    for wrong in ((1, -1), (0, 50)):
        results = case.providers()["torch"].function()
        assert error(case, results, known) < TOLERANCE[4]
        results[wrong[0]][wrong[1]] = torch.nan
        assert error(case, results, known) == float("inf")


@pytest.mark.parametrize("variant", [{}, {"documents": 3}, {"window": 4}])
def test_exact_attention_is_that_of_plain_torch_in_fp64(variant: dict[str, int]) -> None:
    case = cases.build("attention", {"B": 2, "S": 24, "N": 4, "K": 2, "D": 8, **variant}, "fp64", "cpu")
    assert case.plain is not None
    _, results = prepared(case, case.plain(lambda function: function), ["full"])
    for got, known in zip(case.view(results), exact(case), strict=True):
        torch.testing.assert_close(got, known, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_the_weight_lands_in_its_owners_buffer() -> None:
    case = cases.build("linear_cross_entropy", {**TINY, "sink": 1}, "bf16", "cpu")
    for name in ("chunked", "torch"):
        _, (loss, dx, dweight) = prepared(case, case.providers()[name].function, ["full"])
        assert dweight.dtype == (torch.float32 if name == "chunked" else torch.bfloat16)
        assert loss.isfinite() and dx.isfinite().all() and dweight.isfinite().all()


def test_the_sets_for_a_gpu_begin_with_what_has_a_goal() -> None:
    known = {entry.op for entry in sets.GPU if entry.goals}
    assert {entry.op for entry in sets.GPU_QUICK} == known and all(entry.goals for entry in sets.GPU_QUICK)
    assert sets.GPU[: len(sets.GPU_QUICK)] == sets.GPU_QUICK
    assert {entry.op for entry in sets.GPU} >= set(registry.OPS)
    for entry in sets.GPU:
        cases.check(entry.op, entry.sizes, entry.dtype)
        assert all(mode in ("forward", "backward", "full", "step") for mode in entry.goals)


def test_launch_policies_are_providers_that_put_back_what_they_changed() -> None:
    pytest.importorskip("triton")
    from megapre.kernels.triton import cross_entropy, norm

    case = cases.build("rms_norm", {"T": 8, "H": 4096}, "bf16", "cpu")
    assert policies.add(case).variants == {}, "Triton cannot run here"
    own = norm.backward_policy
    with policies.instead("norm", "backward_policy", (1, 4096, 4, 1)):
        assert norm.backward_policy(4096) == (1, 4096, 4, 1) != own(4096)
    assert norm.backward_policy is own
    for name, known in (("norm_forward", norm.forward_policy), ("norm_backward", own)):
        for width in (768, 4096):
            assert known(width) in list(getattr(policies, name)({"H": width})), "the one in use is a candidate"
    for width in (50304, 131072):
        assert cross_entropy.policy(width, 2) in list(policies.cross_entropy({"V": width}))
