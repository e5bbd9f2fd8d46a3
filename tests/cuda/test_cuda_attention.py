"""CUDA attention for sm_80 and sm_90a, emulated: the rule, masks, head dims, layouts, poison, any order of warps."""

import emulated
import pytest
import torch
from attended import drawn, own, qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import close, same
from torch import Tensor

from megapre.kernels import attention

DTYPES = [torch.bfloat16, torch.float16]
OUTPUTS = ("o", "lse", "dq", "dk", "dv")
# Around tiles of 128 and 192 queries and of 32, 64 and 128 keys.
LENGTHS = st.integers(1, 40) | st.sampled_from([63, 64, 65, 100, 127, 128, 129, 160, 200, 260])
# The capability and head dims that its own kernels take; an sm_90 has those for sm_80 for the smaller.
HEAD_DIMS = [(80, dim) for dim in (8, 24, 32, 64, 72, 96, 104, 128, 136, 192, 256)]
HEAD_DIMS += [(90, dim) for dim in (40, 64, 72, 128, 136, 256)]


def attend(
    emulator: emulated.Emulator, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor | None, *settings: object
) -> list[Tensor]:
    """o, lse, dq, dk, dv. The gradients are written over NaN, with no memory behind their ends."""
    o, lse = emulator.ops.attention(q, k, v, *settings)
    gradients = [torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (q, k, v)]
    gradients = [emulator.guarded(t) if t.numel() else t for t in gradients]
    emulator.ops.attention_backward_(*gradients, do, dlse, q, k, v, o, lse, *settings)
    return [o, lse, *gradients]


def obeys(
    emulator: emulated.Emulator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> None:
    """The rule for the outputs and the gradients of o and lse, every input at the end of its memory."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    do = drawn(*q.shape, dtype=q.dtype, seed=9)
    dlse = drawn(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, seed=9)
    mask = attention.visible(q, k, causal, cu_seqlens, window)
    ends = [emulator.guarded(t) for t in (q, k, v, do, dlse)]
    got = attend(emulator, *ends, causal, cu_seqlens, window, scale)
    assert [t.dtype for t in got] == [q.dtype, torch.float32, q.dtype, q.dtype, q.dtype]
    torchs = own(q, k, v, mask, scale, do, dlse)
    exact = own(*(t.double() for t in (q, k, v)), mask, scale, do.double(), dlse)
    for what, g, t, e in zip(OUTPUTS, got, torchs, exact, strict=True):
        assert g.shape == e.shape
        close(g, t, e, what)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(
    batch=st.integers(1, 2),
    keys=LENGTHS,
    cached=st.none() | st.integers(0, 100),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    capability_and_dim=st.sampled_from([(80, 8), (80, 32), (80, 40), (80, 64), (90, 40), (90, 64), (90, 128)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 150),
    documents=st.none() | st.lists(st.integers(0, 400), max_size=6),
    scale=st.sampled_from([None, 0.3]),
)
def test_obeys_the_rule(
    loaded_emulator: emulated.Emulator,
    dtype: torch.dtype,
    batch: int,
    keys: int,
    cached: int | None,
    key_heads: int,
    group: int,
    capability_and_dim: tuple[int, int],
    causal: bool,
    window: int | None,
    documents: list[int] | None,
    scale: float | None,
) -> None:
    """Documents are empty where two cuts meet, and of one token where they are neighbours."""
    queries = keys if documents is not None or cached is None else max(1, keys - cached)
    cu_seqlens = None
    if documents is not None:
        cuts = sorted(min(d, batch * keys) for d in documents)
        cu_seqlens = torch.tensor([0, *cuts, *(c + 1 for c in cuts[-1:] if c < batch * keys), batch * keys])
        cu_seqlens = cu_seqlens.to(torch.int32 if batch == 1 else torch.int64)
    capability, dim = capability_and_dim
    loaded_emulator.device(capability=capability)
    tensors = qkv(batch, queries, keys, key_heads * group, key_heads, dim, dtype)
    obeys(loaded_emulator, *tensors, causal, cu_seqlens, window, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("capability", "dim"), HEAD_DIMS)
def test_every_head_dim(emulator: emulated.Emulator, dtype: torch.dtype, capability: int, dim: int) -> None:
    """Those that fill their tiles, and those that are filled up to them; over more than one tile of both sides."""
    emulator.device(capability=capability)
    obeys(emulator, *qkv(1, 134, 140, 2, 1, dim, dtype), cu_seqlens=None, window=100)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("documents", [False, True])
def test_stages_of_sm90_go_around(emulator: emulated.Emulator, dim: int, documents: bool) -> None:
    """Five tiles of keys, ten of queries and two heads a group: every barrier is in its third phase at least."""
    cu_seqlens = torch.tensor([0, 30, 600], dtype=torch.int32) if documents else None
    emulator.schedule(1)
    obeys(emulator, *qkv(1, 600, 600, 2, 1, dim, torch.bfloat16), causal=documents, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("capability", "dim"), [*((80, dim) for dim in (32, 64, 96, 128, 256)), *((90, dim) for dim in (64, 128, 256))]
)
def test_any_order_of_warps_gives_the_same_bits(emulator: emulated.Emulator, capability: int, dim: int) -> None:
    emulator.device(capability=capability)
    tensors = qkv(1, 150, 150, 2, 1, dim, torch.bfloat16)
    do, cu_seqlens = drawn(1, 150, 2, dim, dtype=torch.bfloat16), torch.tensor([0, 70, 150], dtype=torch.int32)
    expected = attend(emulator, *tensors, do, None, True, cu_seqlens, None, 0.2)
    for seed in range(1, 4):
        emulator.schedule(seed)
        assert same(attend(emulator, *tensors, do, None, True, cu_seqlens, None, 0.2), expected)


@pytest.mark.parametrize("dim", [24, 40])
def test_layouts_do_not_matter(emulator: emulated.Emulator, dim: int) -> None:
    """Views of one projection, transposed and reversed strides, rows across 16 bytes: the bits of whole tensors."""
    batch, length, heads, key_heads = 2, 70, 4, 2
    do = drawn(batch, length, heads, dim, dtype=torch.bfloat16)
    packed = drawn(batch, length, heads + 2 * key_heads, dim, dtype=torch.bfloat16)
    padded = torch.full((batch, length, heads + 2 * key_heads, dim + 3), torch.nan).bfloat16()[..., 1 : dim + 1]
    settings = (True, torch.tensor([0, 50, 51, 90, 2 * length], dtype=torch.int32), 60, 0.2)
    whole = attend(emulator, *packed.split([heads, key_heads, key_heads], dim=2), do, None, *settings)
    for tensor in (
        packed.transpose(1, 2).contiguous().transpose(1, 2),
        packed.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        padded.copy_(packed),
    ):
        parts = tensor.split([heads, key_heads, key_heads], dim=2)
        assert same(attend(emulator, *parts, do.transpose(1, 2).contiguous().transpose(1, 2), None, *settings), whole)
    one_row, upstream = packed[:1].expand(batch, -1, -1, -1), do[:, :, :, :1].expand_as(do)
    for parts in (one_row.split([heads, key_heads, key_heads], dim=2),):
        apart = attend(emulator, *(t.contiguous() for t in parts), upstream.contiguous(), None, *settings)
        assert same(attend(emulator, *parts, upstream, None, *settings), apart)


@pytest.mark.parametrize("at", [8, 3])
@pytest.mark.parametrize("dim", [24, 40])
def test_gradients_of_a_projection_are_written_side_by_side(emulator: emulated.Emulator, at: int, dim: int) -> None:
    """Into views of one tensor, aligned to 16 bytes or not, and nowhere else; and they are seen to be written."""
    heads, key_heads = 4, 2
    parts = drawn(2, 70, heads + 2 * key_heads, dim, dtype=torch.float16).split([heads, key_heads, key_heads], dim=2)
    do, settings = drawn(2, 70, heads, dim, dtype=torch.float16), (True, None, None, 0.2)
    whole = attend(emulator, *parts, do, None, *settings)
    room = torch.full((2, 70, heads + 2 * key_heads + 1, 64), 7.0, dtype=torch.float16)
    gradients = room[:, :, :-1, at : at + dim].split([heads, key_heads, key_heads], dim=2)
    before = room._version
    emulator.ops.attention_backward_(*gradients, do, None, *parts, *whole[:2], *settings)
    assert same([*gradients], whole[2:])
    assert (room[:, :, -1] == 7).all() and (room[..., :at] == 7).all() and (room[..., at + dim :] == 7).all()
    assert room._version > before


@pytest.mark.parametrize("dim", [32, 128])
def test_whole_tiles_of_other_documents_are_never_read(emulator: emulated.Emulator, dim: int) -> None:
    """Keys and values that no query sees may be NaN, if they share no tile with those that some query sees."""
    q, k, v = qkv(1, 256, 256, 2, 2, dim, torch.bfloat16)
    k2, v2 = k.clone(), v.clone()
    k2[:, :128], v2[:, :128] = torch.nan, torch.nan
    settings = (True, torch.tensor([0, 128, 256], dtype=torch.int32), None, 0.25)
    do = torch.ones_like(q)
    before, after = (attend(emulator, q, *kv, do, None, *settings) for kv in ((k, v), (k2, v2)))
    assert same([t[:, 128:] for t in (before[0], *before[2:])], [t[:, 128:] for t in (after[0], *after[2:])])
    before, after = (
        attend(emulator, q[:, 192:], *kv, do[:, 192:], None, True, None, 64, 0.25) for kv in ((k, v), (k2, v2))
    )
    assert same([before[0], before[2]], [after[0], after[2]])
    assert not after[3][:, :128].any() and not after[4][:, :128].any()


@pytest.mark.parametrize("dim", [32, 128])
def test_large_scores_and_poison(emulator: emulated.Emulator, dim: int) -> None:
    """Scores of thousands neither overflow nor vanish; a NaN reaches the queries that see it, or at most their tile."""
    q, k, v = qkv(1, 200, 200, 1, 1, dim, torch.bfloat16)
    mask = attention.visible(q, k, True, None, None)
    do, dlse = torch.ones_like(q), torch.zeros(1, 1, 200)
    got = attend(emulator, q * 30, k * 30, v, do, None, True, None, None, 0.5)
    exact = own((q * 30).double(), (k * 30).double(), v.double(), mask, 0.5, do.double(), dlse)
    torchs = own(q * 30, k * 30, v, mask, 0.5, do, dlse)
    for what, g, t, e in zip(OUTPUTS, got, torchs, exact, strict=True):
        close(g, t, e, what)
    k[0, 150, 0, 3] = torch.nan
    o, lse, dq, *_ = attend(emulator, q, k, v, do, None, True, None, None, 0.5)
    assert o[:, 150:].isnan().all() and lse[:, :, 150:].isnan().all() and dq[:, 150:].isnan().all()
    assert o[:, :128].isfinite().all() and lse[:, :, :128].isfinite().all() and dq[:, :128].isfinite().all()


def test_empty(emulator: emulated.Emulator) -> None:
    for shape, keys in (((0, 4, 2, 8), 4), ((2, 0, 2, 8), 0), ((2, 0, 2, 8), 3), ((1, 4, 0, 8), 4)):
        q, k = torch.zeros(shape).bfloat16(), torch.zeros(shape[0], keys, 2, 8).bfloat16()
        o, lse, dq, dk, dv = attend(emulator, q, k, k, q, None, True, None, None, 1.0)
        assert (o.shape, dq.shape, dk.shape, dv.shape) == (shape, shape, k.shape, k.shape)
        assert lse.shape == (shape[0], shape[2], shape[1])
        assert same([dk, dv], [k, k])


def test_errors_have_numbers(emulator: emulated.Emulator) -> None:
    ops = emulator.ops
    q = torch.zeros(2, 4, 4, 8, dtype=torch.bfloat16)
    lse, plain = torch.zeros(2, 4, 4), (True, None, None, 1.0)
    with pytest.raises(ValueError, match=r"q, k and v are Float.*take bf16 or fp16.*; choose `triton` or `sdpa`"):
        ops.attention(q.float(), q.float(), q.float(), *plain)
    with pytest.raises(ValueError, match=r"q, k and v are BFloat16 \[2, 4, 4, 8\], Half"):
        ops.attention(q, q.half(), q.half(), *plain)
    for dim in (4, 12, 264):
        odd = torch.zeros(1, 1, 1, dim, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f"head dim {dim}; the CUDA kernels take multiples of 8 up to 256"):
            ops.attention(odd, odd, odd, *plain)
    with pytest.raises(ValueError, match=r"scale is -1; the CUDA kernels need scale > 0"):
        ops.attention(q, q, q, True, None, None, -1.0)
    with pytest.raises(ValueError, match=r"need q \[B, Sq, N, D\]"):
        ops.attention(q[0], q, q, *plain)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3 key heads"):
        ops.attention(q, q[:, :, :3], q[:, :, :3], *plain)
    with pytest.raises(ValueError, match="batch and head dim must agree"):
        ops.attention(q, q[:1], q[:1], *plain)
    with pytest.raises(ValueError, match="4 queries but only 3 keys"):
        ops.attention(q, q[:, :3], q[:, :3], *plain)
    with pytest.raises(ValueError, match="window is 0"):
        ops.attention(q, q, q, True, None, 0, 1.0)
    with pytest.raises(ValueError, match=r"cu_seqlens is Float \[2\]"):
        ops.attention(q, q, q, True, torch.tensor([0.0, 8.0]), None, 1.0)
    with pytest.raises(ValueError, match=r"need Sq = Sk; they are 3 and 4"):
        ops.attention(q[:, :3], q, q, True, torch.tensor([0, 8], dtype=torch.int32), None, 1.0)
    with pytest.raises(ValueError, match=r"lse is Float \[2, 4, 3\]; Float \[2, 4, 4\] is needed"):
        ops.attention_backward_(q, q, q, q, None, q, q, q, q, lse[..., :3], *plain)
    turned = torch.zeros(2, 4, 8, 4, dtype=torch.bfloat16).mT
    with pytest.raises(ValueError, match=r"dv is .* with a stride of 4 along its last dim"):
        ops.attention_backward_(q, q, turned, q, None, q, q, q, q, lse, *plain)
    with pytest.raises(ValueError, match=r"dk is BFloat16 \[2, 4, 4, 7\] but k is BFloat16 \[2, 4, 4, 8\]"):
        ops.attention_backward_(q, q[..., :7], q, q, None, q, q, q, q, lse, *plain)
    emulator.device(capability=75)
    with pytest.raises(ValueError, match=r"this device is sm_75; the CUDA kernels need sm_80"):
        ops.attention(q, q, q, *plain)
    emulator.device(capability=86)
    wide = torch.zeros(1, 1, 1, 104, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"head dim 104 needs more shared memory than a block of sm_86 has \(99 KiB"):
        ops.attention(wide, wide, wide, *plain)


def test_smaller_devices(emulator: emulated.Emulator) -> None:
    """Head dims up to 96 fit in the 99 KiB of shared memory of sm_86 and sm_89."""
    emulator.device(capability=86)
    for dim in (64, 96):
        obeys(emulator, *qkv(1, 40, 40, 1, 1, dim, torch.float16))
