"""The C++ cross_entropy, beyond tests/forms: repeatability, labels outside, errors."""

from typing import Any

import pytest
import torch
from rule import same
from scored import IGNORE, all_ways, drawn


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bitwise_for_any_number_of_threads(ops: Any, threads: int) -> None:
    logits, labels = drawn(300, 1111, 1111, torch.float32)
    terms = (labels, 1111, 0.1, 1e-3, None)
    expected = all_ways(ops, logits, *terms)
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            for got, wanted in zip(all_ways(ops, logits, *terms), expected, strict=True):
                assert same(got, wanted)  # a row belongs to one thread, so their number does not matter
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("label", [-1, 30, 32, 2**40, -(2**63)])
def test_a_label_outside_the_vocabulary_changes_nothing(ops: Any, label: int) -> None:
    logits, labels = torch.zeros(4, 32), torch.tensor([0, 29, label, IGNORE])
    for call in (ops.cross_entropy, lambda *args: ops.cross_entropy_(*args[:2], None, *args[2:])):
        with pytest.raises(ValueError, match=rf"label {label} of row 2 lies outside \[0, 30\)"):
            call(logits, labels, IGNORE, 0.0, 0.0, 30)
    assert not logits.any()


def test_errors_have_numbers(ops: Any) -> None:
    logits, labels = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"vocab 33 lies outside \[1, 32\]"):
        ops.cross_entropy(logits, labels, IGNORE, 0.0, 0.0, 33)
    with pytest.raises(ValueError, match=r"vocab 0 lies outside"):
        ops.cross_entropy(logits, labels, IGNORE, 0.0, 0.0, 0)
    with pytest.raises(ValueError, match=r"labels \[3\]"):
        ops.cross_entropy(logits, labels[:3], IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match=r"label_smoothing 1.5"):
        ops.cross_entropy(logits, labels, IGNORE, 1.5, 0.0, 32)
    with pytest.raises(TypeError, match="labels are Int, not int64"):
        ops.cross_entropy(logits, labels.int(), IGNORE, 0.0, 0.0, 32)
    with pytest.raises(TypeError, match="supported are fp32"):
        ops.cross_entropy(logits.int(), labels, IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match=r"dlosses is Double"):
        ops.cross_entropy_(logits, labels, torch.ones(4, dtype=torch.float64), IGNORE, 0.0, 0.0, 32)
