"""The native forms of attention: the 2x rule, masks, layouts, gradients side by side, poison, large scores, nothing."""

import pytest
import torch
from attended import OUTPUTS, attend, documents_of, drawn, guarded, obeys, own, qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from native_forms import Form
from rule import close, same

from megapre.kernels import attention

DTYPES = {"cpu": [torch.float32, torch.bfloat16, torch.float16], "cuda": [torch.bfloat16, torch.float16]}
LENGTHS = {
    "cpu": st.integers(1, 70) | st.sampled_from([64, 127, 128, 129, 191, 200, 257]),  # tiles of 64 queries and keys
    # Tiles of 128 and 192 queries and of 32, 64 and 128 keys.
    "cuda": st.integers(1, 40) | st.sampled_from([63, 64, 65, 100, 127, 128, 129, 160, 200, 260]),
}
# With the capability: CUDA has kernels for sm_80 and, for larger heads, sm_90a. test_cuda_attention.py has all dims.
HEAD_DIMS = {
    "cpu": st.tuples(st.just(0), st.sampled_from([1, 7, 8, 16, 31, 32, 40, 64, 96, 128, 129, 256])),
    "cuda": st.sampled_from([(80, 8), (80, 32), (80, 40), (80, 64), (90, 40), (90, 64), (90, 128), (90, 136)]),
}
SCALES = {"cpu": st.sampled_from([None, 0.3, 0.0, -0.1]), "cuda": st.sampled_from([None, 0.3])}
EXAMPLES = {"cpu": 100, "cuda": 30}  # an emulated one takes a third of a second


def test_obeys_the_rule(form: Form, dtype: torch.dtype) -> None:
    """Every input at the end of its memory; documents are empty where two cuts meet."""
    # do . v and do . o are sums of up to 256 products of order one, in two orders. In fp32 the noise of their
    # difference, some ulps of 16, reaches the gradients even where these are 0; torch may be lucky.
    slack = 16 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.0

    @settings(max_examples=EXAMPLES[form.name])
    @given(
        batch=st.integers(1, 2),
        keys=LENGTHS[form.name],
        cached=st.none() | st.integers(0, 100),
        key_heads=st.integers(1, 2),
        group=st.integers(1, 3),
        capability_and_dim=HEAD_DIMS[form.name],
        causal=st.booleans(),
        window=st.none() | st.integers(1, 150),
        cuts=st.none() | st.lists(st.integers(0, 514), max_size=6),
        scale=SCALES[form.name],
    )
    def in_each_case(
        batch: int, keys: int, cached: int | None, key_heads: int, group: int, capability_and_dim: tuple[int, int],
        causal: bool, window: int | None, cuts: list[int] | None, scale: float | None,
    ) -> None:  # fmt: skip
        capability, dim = capability_and_dim
        form.device(capability=capability)
        queries = keys if cuts is not None or cached is None else max(1, keys - cached)
        tensors = qkv(batch, queries, keys, key_heads * group, key_heads, dim, dtype)
        obeys(guarded(form), *tensors, causal, documents_of(cuts, batch, keys), window, scale, slack)

    in_each_case()


@pytest.mark.parametrize("dim", [24, 40])
def test_layouts_do_not_matter(form: Form, dtype: torch.dtype, dim: int) -> None:
    """Views of one projection, transposed and reversed strides, rows across 16 bytes: the bits of whole tensors."""
    batch, length, heads, key_heads = 2, {"cpu": 130, "cuda": 70}[form.name], 4, 2
    do = drawn(batch, length, heads, dim, dtype=dtype)
    packed = drawn(batch, length, heads + 2 * key_heads, dim, dtype=dtype)
    padded = torch.full((batch, length, heads + 2 * key_heads, dim + 3), torch.nan, dtype=dtype)[..., 1 : dim + 1]
    settings = (True, torch.tensor([0, 50, 51, length + 20, 2 * length], dtype=torch.int32), 60, 0.2)
    whole = attend(
        form, *(t.contiguous() for t in packed.split([heads, key_heads, key_heads], dim=2)), do, None, *settings
    )
    for tensor in (
        packed,
        packed.transpose(1, 2).contiguous().transpose(1, 2),
        packed.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        padded.copy_(packed),
    ):
        parts = tensor.split([heads, key_heads, key_heads], dim=2)
        assert same(attend(form, *parts, do.transpose(1, 2).contiguous().transpose(1, 2), None, *settings), whole)
    one_row, upstream = packed[:1].expand(batch, -1, -1, -1), do[:, :, :, :1].expand_as(do)
    parts = one_row.split([heads, key_heads, key_heads], dim=2)
    apart = attend(form, *(t.contiguous() for t in parts), upstream.contiguous(), None, *settings)
    assert same(attend(form, *parts, upstream, None, *settings), apart)


@pytest.mark.parametrize("at", [8, 3])
@pytest.mark.parametrize("dim", [24, 40])
def test_gradients_of_a_projection_are_written_side_by_side(form: Form, dtype: torch.dtype, at: int, dim: int) -> None:
    """Into views of one tensor, aligned to 16 bytes or not, and nowhere else; and they are seen to be written."""
    heads, key_heads = 4, 2
    parts = drawn(2, 70, heads + 2 * key_heads, dim, dtype=dtype).split([heads, key_heads, key_heads], dim=2)
    do, settings = drawn(2, 70, heads, dim, dtype=dtype), (True, None, None, 0.2)
    whole = attend(form, *parts, do, None, *settings)
    room = torch.full((2, 70, heads + 2 * key_heads + 1, 64), 7.0, dtype=dtype)
    gradients = room[:, :, :-1, at : at + dim].split([heads, key_heads, key_heads], dim=2)
    before = room._version
    form.ops.attention_backward_(*gradients, do, None, *parts, *whole[:2], *settings)
    assert same([*gradients], whole[2:])
    assert (room[:, :, -1] == 7).all() and (room[..., :at] == 7).all() and (room[..., at + dim :] == 7).all()
    assert room._version > before


@pytest.mark.parametrize("dim", [16, 32, 128])
def test_whole_tiles_of_other_documents_are_never_read(form: Form, dtype: torch.dtype, dim: int) -> None:
    """Keys and values that no query sees may be NaN, if they share no tile with those that some query sees."""
    q, k, v = qkv(1, 256, 256, 2, 2, dim, dtype)
    k2, v2 = k.clone(), v.clone()
    k2[:, :128], v2[:, :128] = torch.nan, torch.nan
    settings = (True, torch.tensor([0, 128, 256], dtype=torch.int32), None, 0.25)
    do = torch.ones_like(q)
    before, after = (attend(form, q, *kv, do, None, *settings) for kv in ((k, v), (k2, v2)))
    assert same([t[:, 128:] for t in (before[0], *before[2:])], [t[:, 128:] for t in (after[0], *after[2:])])
    before, after = (
        attend(form, q[:, 192:], *kv, do[:, 192:], None, True, None, 64, 0.25) for kv in ((k, v), (k2, v2))
    )
    assert same([before[0], before[2]], [after[0], after[2]])
    assert not after[3][:, :128].any() and not after[4][:, :128].any()


@pytest.mark.parametrize("dim", [32, 128])
def test_large_scores_and_poison(form: Form, dtype: torch.dtype, dim: int) -> None:
    """Scores of thousands neither overflow nor vanish; a NaN reaches the queries that see it, or at most their tile."""
    q, k, v = qkv(1, 200, 200, 1, 1, dim, dtype)
    mask = attention.visible(q, k, True, None, None)
    do, dlse = torch.ones_like(q), torch.zeros(1, 1, 200)
    got = attend(form, q * 30, k * 30, v, do, None, True, None, None, 0.5)
    exact = own((q * 30).double(), (k * 30).double(), v.double(), mask, 0.5, do.double(), dlse)
    torchs = own(q * 30, k * 30, v, mask, 0.5, do, dlse)
    for what, g, t, e in zip(OUTPUTS, got, torchs, exact, strict=True):
        close(g, t, e, what)
    for bad in (torch.nan, torch.inf):
        k[0, 150, 0, 3] = bad
        o, lse, dq, *_ = attend(form, q.abs() + 0.1, k, v, do, None, True, None, None, 0.5)
        assert o[:, 150:].isnan().all() and lse[:, :, 150:].isnan().all() and dq[:, 150:].isnan().all()
        assert o[:, :128].isfinite().all() and lse[:, :, :128].isfinite().all() and dq[:, :128].isfinite().all()


def test_empty(form: Form, dtype: torch.dtype) -> None:
    for shape, keys in (((0, 4, 2, 8), 4), ((2, 0, 2, 8), 0), ((2, 0, 2, 8), 3), ((1, 4, 0, 8), 4)):
        q, k = torch.zeros(shape, dtype=dtype), torch.zeros(shape[0], keys, 2, 8, dtype=dtype)
        o, lse, dq, dk, dv = attend(form, q, k, k, q, None, True, None, None, 1.0)
        assert (o.shape, dq.shape, dk.shape, dv.shape) == (shape, shape, k.shape, k.shape)
        assert lse.shape == (shape[0], shape[2], shape[1])
        assert same([dk, dv], [k, k])


SHAPES = {"q": (2, 4, 4, 8), "k": (2, 4, 4, 8), "v": (2, 4, 4, 8)}
IMPOSSIBLE: list[tuple[dict[str, tuple[int, ...]], tuple[object, ...], str]] = [
    ({"q": (4, 4, 8)}, (None, None), r"need q \[B, Sq, N, D\]"),
    ({"k": (2, 4, 3, 8), "v": (2, 4, 3, 8)}, (None, None), "4 query heads are no multiple of 3 key heads"),
    ({"k": (1, 4, 4, 8), "v": (1, 4, 4, 8)}, (None, None), "batch and head dim must agree"),
    ({"k": (2, 3, 4, 8), "v": (2, 3, 4, 8)}, (None, None), "4 queries but only 3 keys"),
    ({}, (None, 0), "window is 0"),
    ({}, (torch.tensor([0.0, 8.0]), None), "cu_seqlens is Float"),
    ({"q": (2, 3, 4, 8)}, (torch.tensor([0, 8], dtype=torch.int32), None), "need Sq = Sk; they are 3 and 4"),
]


@pytest.mark.parametrize(("change", "documents_and_window", "words"), IMPOSSIBLE)
def test_impossible_requests_are_named(
    form: Form, change: dict[str, tuple[int, ...]], documents_and_window: tuple[object, ...], words: str
) -> None:
    tensors = [torch.zeros(shape, dtype=torch.bfloat16) for shape in (SHAPES | change).values()]
    with pytest.raises(ValueError, match=words):
        form.ops.attention(*tensors, True, *documents_and_window, 1.0)
