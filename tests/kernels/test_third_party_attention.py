"""FlashAttention and torch's backends as rows: what they are asked for, what they refuse, which is the default."""

import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from rule import twice
from stand_ins import Calls, random
from torch import Tensor
from torch.nn import functional as F

from megapre import kernels
from megapre.kernels import attention
from megapre.kernels.third_party import flash_attention, torch_sdpa

pytestmark = pytest.mark.usefixtures("nothing_real")


def flash_stand_in(calls: Calls) -> dict[str, Any]:
    """FlashAttention's two functions, with the arguments that versions 2 and 3 have in common by keyword."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: Any, causal: bool, window_size: Any, deterministic: bool
    ) -> Tensor:
        calls.append({"window": window_size, "deterministic": deterministic})
        left, right = window_size
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            mask &= distance >= 0
        if left >= 0:
            mask &= distance <= left
        if right >= 0:
            mask &= -distance <= right
        group = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=softmax_scale)
        return o.transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, **settings: Any
    ) -> Tensor:
        assert q.dim() == 3 and cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        ends = cu_q.tolist()
        assert ends[0] == 0 and ends[-1] == len(q) and max(b - a for a, b in pairwise(ends)) <= most_q == most_k
        parts = [
            flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], **settings)[0] for a, b in pairwise(ends) if b > a
        ]
        return torch.cat(parts)

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cuts", [None, [0, 3, 10, 21, 32], [0, 16, 32]])
@pytest.mark.parametrize(
    ("module", "row"),
    [
        ("flash_attn_interface", flash_attention.flash_attention_3),
        ("flash_attn", flash_attention.flash_attention_2),
    ],
)
def test_flash_attention_gets_what_it_asks_for(
    module: str,
    row: Callable[..., Tensor],
    cuts: list[int] | None,
    window: int | None,
    causal: bool,
    stand_in: Callable[..., None],
) -> None:
    calls: Calls = []
    stand_in(module, **flash_stand_in(calls))
    q, k, v = (random(2, 16, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    twice(
        lambda q, k, v: row(q, k, v, causal, cu_seqlens, window, 0.3),
        lambda q, k, v: attention.sdpa(q, k, v, causal, cu_seqlens, window, 0.3),
        [q, k, v],
    )
    expected = (-1, -1) if window is None else (4, 0 if causal else 4)
    assert {call["window"] for call in calls} == {expected}
    assert {call["deterministic"] for call in calls} == {True}, "these tests ask torch for deterministic algorithms"


def test_a_cache_has_more_keys_than_queries(stand_in: Callable[..., None]) -> None:
    stand_in("flash_attn", **flash_stand_in([]))
    q, k = random(2, 3, 4, 8, dtype=torch.bfloat16), random(2, 9, 2, 8, dtype=torch.bfloat16)
    got, expected = (op(q, k, k) for op in (flash_attention.flash_attention_2, attention.reference))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert flash_attention.flash_attention_2(q[:, :0], k, k).shape == (2, 0, 4, 8)


@pytest.mark.parametrize(
    ("row", "given", "words"),
    [
        ("flash_attention_2", {"dtype": torch.float32}, "torch.float32 with head dim 8"),
        ("flash_attention_3", {"head_dim": 264}, "bfloat16 with head dim 264"),
        ("flash_attention_3", {"return_lse": True}, "head dim 8 and lse"),
        ("cudnn", {"dtype": torch.float32}, "this call is in torch.float32"),
        ("cudnn", {"head_dim": 136}, "head dim 136"),
        ("cudnn", {"head_dim": 12}, "head dim 12"),
        ("cudnn", {"window": 3}, "this call has a window"),
        ("cudnn", {"cu_seqlens": True, "return_lse": True}, "this call has cu_seqlens and lse"),
        ("cudnn", {"queries": 3}, "causal with 3 queries and 6 keys"),
        ("flash", {"cu_seqlens": True}, "this call has cu_seqlens"),
        ("flash", {"head_dim": 264}, "head dim 264"),
    ],
)
def test_a_call_that_a_row_does_not_take_is_refused_in_words(row: str, given: dict[str, Any], words: str) -> None:
    dtype, head_dim = given.pop("dtype", torch.bfloat16), given.pop("head_dim", 8)
    q = random(1, given.pop("queries", 6), 2, head_dim, dtype=dtype)
    k = random(1, 6, 2, head_dim, dtype=dtype)
    if given.get("cu_seqlens"):
        given["cu_seqlens"] = torch.tensor([0, 2, 6], dtype=torch.int32)
    module = torch_sdpa if row in ("cudnn", "flash") else flash_attention
    stand_ins = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if row in stand_ins:
        sys.modules.setdefault(stand_ins[row], ModuleType(stand_ins[row]))
    try:
        with pytest.raises(ValueError, match=f"attention: {row} takes .*; .*{words}.*; choose `"):
            getattr(module, row)(q, k, k, **given)
    finally:
        if row in stand_ins and not hasattr(sys.modules[stand_ins[row]], "__file__"):
            del sys.modules[stand_ins[row]]


def test_one_backend_is_asked_for_and_its_absence_is_told() -> None:
    """A CPU has no cuDNN: torch's own refusal comes out as an error of the op that names the shapes."""
    q = random(1, 4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"finds no cudnn kernel for q \(1, 4, 2, 8\).* choose `sdpa`"):
        torch_sdpa.cudnn(q, q, q)
    torch.testing.assert_close(torch_sdpa.flash(q, q, q), attention.reference(q, q, q), rtol=2e-2, atol=2e-2)


def test_which_kernel_serves_which_call(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for module, name, label in (
        (torch_sdpa, "sdpa", "cudnn"),
        (torch_sdpa.triton, "attention", "triton"),
        (torch_sdpa.triton, "sdpa", "sdpa"),
    ):
        monkeypatch.setattr(module, name, lambda q, *rest, label=label: taken.append(label) or q)
    half, wide = random(1, 6, 2, 8, dtype=torch.bfloat16), random(1, 6, 2, 8)
    large = random(1, 6, 2, 256, dtype=torch.bfloat16)
    cuts = torch.tensor([0, 2, 6], dtype=torch.int32)
    for arguments, expected in (
        (((half, half, half), {}), "cudnn"),
        (((half, half, half), {"causal": False}), "cudnn"),
        (((half, half, half), {"cu_seqlens": cuts}), "triton"),
        (((half, half, half), {"window": 3}), "triton"),
        (((half, half, half), {"return_lse": True}), "triton"),
        (((half[:, :1], half, half), {}), "sdpa"),
        (((wide, wide, wide), {}), "sdpa"),
        (((large, large, large), {}), "sdpa"),
    ):
        taken.clear()
        torch_sdpa.cudnn_or_triton(*arguments[0], **arguments[1])
        assert taken == [expected], arguments[1]


def test_where_torch_refuses_cudnn_its_next_best_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, or on a GPU under deterministic algorithms: the default must not be an error there."""
    q, k = random(1, 4, 4, 8, dtype=torch.bfloat16), random(1, 4, 2, 8, dtype=torch.bfloat16)
    orders: list[list[int]] = []

    def seen(*arguments: Any) -> Any:
        orders.append(torch._C._get_sdp_priority_order())
        return attention.sdpa(*arguments)

    monkeypatch.setattr(torch_sdpa, "sdpa", seen)
    before = torch._C._get_sdp_priority_order()
    got = torch_sdpa.cudnn_or_triton(q, k, k)
    torch.testing.assert_close(got, attention.reference(q, k, k), rtol=2e-2, atol=2e-2)
    assert orders[0][0] == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    assert torch._C._get_sdp_priority_order() == before
    compiled = torch.compile(torch_sdpa.cudnn_or_triton, backend="aot_eager", fullgraph=True)
    monkeypatch.undo()
    torch.testing.assert_close(compiled(q, k, k), got)


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "cudnn_or_triton"), ((8, 0), "sdpa_or_triton")])
def test_the_default_is_what_was_measured_for_the_device(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr("megapre.kernels.library.has_native", lambda op, device: False)
    assert kernels.choose("cuda").names["attention"] == expected
