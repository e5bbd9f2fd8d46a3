"""The C++ halves of cross-entropy, beyond tests/forms: their plain forms, errors."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scored import IGNORE, cut, drawn_for_shards

from megapre.kernels import vocab_parallel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(
    rows=st.integers(1, 4),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    padding=st.integers(0, 50),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_the_plain_forms_agree(
    ops: Any, dtype: torch.dtype, rows: int, widths: list[int], padding: int, smoothing: float
) -> None:
    vocab = max(1, sum(widths) - padding)
    logits, labels = drawn_for_shards(rows, widths, vocab, dtype)
    start = 0
    for shard in cut(logits, widths):
        settings = (start, vocab, IGNORE)
        stats = vocab_parallel.local(shard, labels, *settings, smoothing)
        plain = vocab_parallel.local_reference(shard, labels, *settings, smoothing != 0)
        torch.testing.assert_close(stats, plain, rtol=1e-5, atol=1e-5)
        lse = torch.full((rows,), 5.0, dtype=stats.dtype)
        other = shard.clone()
        vocab_parallel.gradient_(shard, labels, lse, None, *settings, smoothing, 1e-3)
        vocab_parallel.gradient_reference_(other, labels, lse, None, *settings, smoothing, 1e-3)
        torch.testing.assert_close(shard, other)
        start += shard.shape[1]


def test_errors_have_numbers(ops: Any) -> None:
    logits, labels = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"label 64 of row 2 lies outside \[0, 64\)"):
        vocab_parallel.local(logits, torch.tensor([0, IGNORE, 64, 0]), 0, 64)
    with pytest.raises(ValueError, match=r"label 64 of row 2"):
        vocab_parallel.gradient_(logits, torch.tensor([0, IGNORE, 64, 0]), torch.zeros(4), None, 0, 64)
    assert not logits.any()
    with pytest.raises(ValueError, match="a shard from column -1 on of 64 columns"):
        vocab_parallel.local(logits, labels, -1, 64)
    with pytest.raises(ValueError, match=r"labels \[3\]"):
        vocab_parallel.local(logits, labels[:3], 0, 64)
    with pytest.raises(TypeError, match="supported are fp32"):
        vocab_parallel.local(logits.int(), labels, 0, 64)
    with pytest.raises(ValueError, match=r"lse is Float \[3\]"):
        vocab_parallel.gradient_(logits, labels, torch.zeros(3), None, 0, 64)
    with pytest.raises(ValueError, match=r"label_smoothing 1.5"):
        vocab_parallel.gradient_(logits, labels, torch.zeros(4), None, 0, 64, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"stats are \(2, 4, 3\); \[ranks, 4, 4\] is needed for 4 labels"):
        vocab_parallel.merge(torch.zeros(2, 4, 3), labels, 64, label_smoothing=0.1)
