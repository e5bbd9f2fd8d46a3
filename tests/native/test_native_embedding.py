"""The C++ embedding and its gradient's sums: fp64, layouts, empty, poison, the same bits for any threads, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule import close
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@given(tokens=st.integers(0, 90), rows=st.integers(1, 12), width=st.integers(1, 70), accumulate=st.booleans())
def test_obeys_the_rule(ops: Any, dtype: torch.dtype, tokens: int, rows: int, width: int, accumulate: bool) -> None:
    ids = torch.randint(rows, (tokens,), generator=torch.Generator().manual_seed(tokens))
    dy = drawn(1, tokens, width, dtype=dtype)
    for total_dtype in {dtype, acc(dtype)}:
        before = drawn(2, rows, width, dtype=total_dtype)
        total = before.clone() if accumulate else torch.full_like(before, torch.nan)
        ops.embedding_gradient_(total, dy, ids, accumulate)
        start = before if accumulate else torch.zeros_like(before)
        exact = start.double().index_add(0, ids, dy.double())
        own = start.to(acc(dtype)).index_add(0, ids, dy.to(acc(dtype))).to(total_dtype)
        close(total, own, exact)


def test_any_layout_and_any_threads_give_the_same_bits(ops: Any) -> None:
    ids = torch.randint(50, (3000,), generator=torch.Generator().manual_seed(0)) ** 2 // 50
    dy = drawn(1, 3000, 77, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for given_dy in (dy, torch.full((3000, 90), torch.nan).bfloat16()[:, 5:82].copy_(dy), dy.T.contiguous().T):
            total = torch.full((50, 90), torch.nan)
            ops.embedding_gradient_(total[:, 3:80], given_dy, ids.repeat_interleave(2)[::2], False)
            assert total[:, :3].isnan().all() and total[:, 80:].isnan().all(), "written beyond its columns"
            results.append(total[:, 3:80].clone())
    torch.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tokens=st.integers(0, 90),
    rows=st.integers(0, 12),
    width=st.integers(0, 70),
    start=st.integers(0, 9),
    beyond=st.integers(0, 9),
)
def test_rows_of_a_shard(
    ops: Any, dtype: torch.dtype, tokens: int, rows: int, width: int, start: int, beyond: int
) -> None:
    vocab = start + rows + beyond
    ids = torch.randint(max(vocab, 1), (tokens,), generator=torch.Generator().manual_seed(tokens))
    ids = ids if vocab else ids[:0]
    whole = drawn(1, vocab, width, dtype=dtype)
    here = (ids >= start) & (ids < start + rows)
    expected = whole[ids].where(here.unsqueeze(1), 0.0)
    home = torch.full((rows, width + 9), torch.nan, dtype=dtype)
    home[:, 4 : width + 4] = whole[start : start + rows]
    for weight in (whole[start : start + rows].clone(), home[:, 4 : width + 4], home.T.clone().T[:, 4 : width + 4]):
        for given_ids in (ids, ids.repeat_interleave(2)[::2]):
            assert torch.equal(ops.embedding(given_ids, weight, start, vocab), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tokens=st.integers(0, 90),
    rows=st.integers(1, 9),
    width=st.integers(1, 70),
    start=st.integers(0, 12),
    accumulate=st.booleans(),
)
def test_gradient_of_a_shard(
    ops: Any, dtype: torch.dtype, tokens: int, rows: int, width: int, start: int, accumulate: bool
) -> None:
    """The bits are those of the shard's rows of the whole gradient."""
    ids = torch.randint(21, (tokens,), generator=torch.Generator().manual_seed(tokens))
    dy = drawn(1, tokens, width, dtype=dtype)
    for total_dtype in {dtype, acc(dtype)}:
        whole = drawn(2, 21, width, dtype=total_dtype)
        total = (
            whole[start : start + rows].clone() if accumulate else torch.full((rows, width), torch.nan).to(total_dtype)
        )
        ops.embedding_gradient_(whole, dy, ids, accumulate)
        ops.embedding_gradient_(total, dy, ids, accumulate, start, 21)
        assert torch.equal(total, whole[start : start + rows])


def test_many_rows_for_any_threads(ops: Any) -> None:
    ids = torch.randint(400, (3, 1000), generator=torch.Generator().manual_seed(0))
    weight = drawn(1, 100, 320, dtype=torch.bfloat16)
    expected = torch.zeros(400, 320, dtype=torch.bfloat16)
    expected[150:250] = weight
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.embedding(ids, weight, 150, 400), expected[ids])
    torch.set_num_threads(1)


def test_offsets_beyond_31_bits(ops: Any, far: Callable[[Tensor], Tensor]) -> None:
    total, ids = drawn(0, 3, 40, dtype=torch.float32), torch.tensor([2, 0, 2, 1])
    apart, dy = far(total), drawn(1, 4, 40, dtype=torch.bfloat16)
    assert torch.equal(ops.embedding(ids, apart), total[ids])
    ops.embedding_gradient_(apart, far(dy), ids, True)
    ops.embedding_gradient_(total, dy, ids, True)
    assert torch.equal(apart, total)


def test_errors_have_numbers(ops: Any) -> None:
    total, dy, ids = torch.ones(4, 3), torch.ones(2, 3), torch.tensor([0, 4])
    with pytest.raises(IndexError, match=r"id 4 of token 1 lies outside \[0, 4\)"):
        ops.embedding_gradient_(total, dy, ids, True)
    assert torch.equal(total, torch.ones(4, 3)), "written before it was checked"
    with pytest.raises(ValueError, match=r"dy is \[2, 3\], ids \[1\] and the gradient \[4, 3\]"):
        ops.embedding_gradient_(total, dy, ids[:1], True)
    with pytest.raises(TypeError, match="the gradient is Double; it can be Float or that of dy, Float"):
        ops.embedding_gradient_(total.double(), dy, ids, True)
    with pytest.raises(ValueError, match=r"\[1, 4\]; to be written, the 3 elements of a row must be neighbours"):
        ops.embedding_gradient_(torch.ones(3, 4).T, dy, ids, True)
    with pytest.raises(ValueError, match=r"strides \[0, 1\].* rows must not overlap"):
        ops.embedding_gradient_(torch.ones(1, 3).expand(5, 3), dy, ids, True)
    with pytest.raises(TypeError, match="ids are Int, not int64"):
        ops.embedding_gradient_(total, dy, ids.int(), True)
    with pytest.raises(TypeError, match="ids are Int, not int64"):
        ops.embedding(ids.int(), total)
    with pytest.raises(ValueError, match=r"the table is \[4\]; \[rows, width\] is needed"):
        ops.embedding(ids, total[:, 0])
    with pytest.raises(IndexError, match=r"id 4 of token 1 lies outside \[0, 4\)"):
        ops.embedding(ids, total)
    for op, arguments in ((ops.embedding, (ids, total)), (ops.embedding_gradient_, (total, dy, ids, True))):
        with pytest.raises(IndexError, match=r"id 4 of token 1 lies outside \[0, 3\)"):
            op(*arguments, 2, 3)
        with pytest.raises(ValueError, match="a shard of 4 rows from row -2 on of 9; neither can be negative"):
            op(*arguments, -2, 9)
