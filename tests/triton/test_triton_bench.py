"""The benchmark's cases: the Triton kernels as it calls and repeats them, and under other launch policies."""

import pytest

from megapre.kernels.bench import cases, policies
from megapre.kernels.bench.case import implementations
from megapre.kernels.bench.exact import TOLERANCE, error, exact
from megapre.kernels.bench.works import prepared

SIZES = {"T": 6, "B": 2, "S": 3, "H": 40, "N": 4, "K": 2, "D": 16, "F": 24, "V": 48, "P": 3000}
OPS = [
    *("rms_norm", "layer_norm", "rope", "rope_", "gelu", "swiglu", "geglu", "cross_entropy", "cross_entropy_"),
    *("vocab_parallel_cross_entropy_", "linear_cross_entropy", "vocab_parallel_linear_cross_entropy", "attention"),
    *("adamw_", "adamw_stochastic_", "grad_norm"),
]


def off(op: str, sizes: dict[str, int], device: str) -> float:
    case = cases.build(op, sizes, "bf16", device)
    (function,) = (row.function for row in implementations(op) if row.name == "triton")
    works, results = prepared(case, case.adapt(function), list(case.work))
    for work in works.values():
        work()  # as a benchmark does, many times
        work()
    return error(case, results, exact(case))


@pytest.mark.parametrize("op", OPS)
def test_every_case_of_a_triton_kernel(op: str, device: str) -> None:
    assert off(op, SIZES, device) <= TOLERANCE[2]


def test_the_gradient_of_the_weight_goes_into_its_owners_buffer(device: str) -> None:
    assert off("linear_cross_entropy", {**SIZES, "sink": 1}, device) <= TOLERANCE[2]


@pytest.mark.parametrize("op", ["rms_norm", "cross_entropy_"])
def test_every_launch_policy(op: str, device: str) -> None:
    sizes = {"T": 3, "H": 1040, "V": 1040}
    for module, name, candidates in policies.POLICIES[op]:
        found = list(candidates(cases.complete(sizes)))
        assert len(found) > 1
        for given in (found[0], found[-1]):
            with policies.instead(module, name, given):
                assert off(op, sizes, device) <= TOLERANCE[2], given
