"""What a transformer must do whatever its family: start at chance, learn, mask, respect its bounds, compile."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from megapre import kernels
from megapre.config import load
from megapre.model import ModelError, Transformer, decays, export_state, initialize
from megapre.model.cache import KVCache
from megapre.model.transformer import Piece


def randomize(model: Transformer, seed: int = 3) -> None:
    """Weights larger than at initialisation, norms and biases included: nothing cancels, nothing is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.empty(param.shape).normal_(0, 0.2, generator=generator)
            vector_one = param.ndim == 1 and not name.endswith("bias")
            param.copy_(noise + (1.0 if vector_one else 0.0))
            if name in ("embed.weight", "head.weight"):
                param[model.cfg.vocab :] = 0


def test_initial_loss_is_that_of_a_guess(build, shape, tokens):
    model = build(shape, hidden=128, heads=4, vocab=1000)
    x, y = tokens(4, 32, 1000), tokens(8, 32, 1000)[4:]
    loss = model.loss(x, y).item() / y.numel()
    assert abs(loss - math.log(1000)) < 0.1
    # More exactly: independent logits of variance s add s/2, and the head reads a normed stream of hidden * 1 squares.
    assert abs(loss - math.log(1000) - 128 * 0.02**2 / 2) < 0.05


def test_loss_is_the_sum_over_labelled_tokens_of_what_forward_says(build, shape, tokens):
    model = build(shape)
    randomize(model)
    x, y = tokens(3, 20), tokens(6, 20)[3:].clone()
    y[0, :5] = y[2, 7] = -100
    logits = model(x)
    assert logits.shape == (3, 20, 200)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), y.flatten(), reduction="sum")
    got = model.loss(x, y)
    assert got.dtype == torch.float32 and got.shape == ()
    assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_overfits_one_batch(build, shape, tokens):
    model = build(shape)
    x = tokens(2, 17)
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays(n, p)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(50):
        loss = model.loss(x[:, :-1], x[:, 1:]) / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    with torch.no_grad():
        assert torch.equal(model(x[:, :-1]).argmax(-1), x[:, 1:])


def test_padded_rows_stay_zero_and_get_no_gradient(build, tokens):
    model = build("llama", vocab=130)
    assert model.embed.weight.shape[0] == model.head.weight.shape[0] == 256
    x = tokens(2, 16, 130)
    model.loss(x, x).backward()
    for table in (model.embed.weight, model.head.weight):
        assert not table[130:].any() and not table.grad[130:].any()
        assert table.grad[:130].any()


def test_a_token_sees_its_past_and_itself_only(build, shape, tokens):
    model = build(shape)
    randomize(model)
    x = tokens(1, 24)
    changed = x.clone()
    changed[0, 10] = (x[0, 10] + 1) % 200
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(-1).all()


@pytest.mark.parametrize("lengths", [[20], [1, 19], [7, 5, 8], [3, 1, 1, 15]])
def test_document_masking_equals_documents_alone(build, shape, tokens, lengths):
    """Two rows of 20 tokens, cut at `lengths`, positions counted from each document's start."""
    model = build(shape)
    randomize(model)
    x = tokens(2, 20)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, 20)
    cu_seqlens = torch.tensor([0, *(lengths * 2)], dtype=torch.int32).cumsum(0).int()
    y = x.roll(-1, 1)
    packed = model(x, positions, cu_seqlens)
    loss = model.loss(x, y, positions, cu_seqlens)
    alone = [model(piece) for row in x for piece in row.unsqueeze(0).split(lengths, 1)]
    # fp32 sums over keys in another order: some ulps of logits of size ~10.
    assert_close(packed, torch.cat(alone, 1).view(2, 20, -1), rtol=1e-4, atol=1e-4)
    losses = [
        model.loss(a, b)
        for row, label in zip(x, y, strict=True)
        for a, b in zip(row[None].split(lengths, 1), label[None].split(lengths, 1), strict=True)
    ]
    assert_close(loss, torch.stack(losses).sum(), rtol=1e-5, atol=0)


def test_documents_do_not_leak_into_each_other_even_with_running_positions(build, shape, tokens):
    model = build(shape)
    randomize(model)
    x = tokens(1, 20)
    changed = x.clone()
    changed[0, :9] = x[0, :9].flip(0)
    cu_seqlens = torch.tensor([0, 9, 20], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(model(x, None, cu_seqlens)[:, 9:], model(changed, None, cu_seqlens)[:, 9:])


def test_positions_default_to_counting_and_matter(build, shape, tokens):
    model = build(shape)
    randomize(model)
    x = tokens(2, 16)
    counted = torch.arange(16).expand(2, 16)
    assert_close(model(x), model(x, counted), rtol=0, atol=0)
    assert not torch.allclose(model(x), model(x, counted * 2), atol=1e-3)


def test_more_tokens_than_positions_is_a_clear_error(build, tokens):
    model = build("llama")
    with pytest.raises(
        ModelError, match=r"33 tokens from position 0 on need 33 positions, but the model's context has 32"
    ):
        model(tokens(1, 33))
    cache = KVCache(model.cfg, 1, 8, dtype=torch.float32, device="cpu")
    model(tokens(1, 6), cache=cache)
    with pytest.raises(ModelError, match=r"3 tokens from position 6 on .* the cache has 8; at most 2 tokens fit"):
        model(tokens(1, 3), cache=cache)


def test_bf16_model_follows_the_fp32_one(build, shape, tokens):
    exact, rounded = build(shape), build(shape, dtype=torch.bfloat16)
    x = tokens(4, 32)
    losses = [m.loss(x, x.roll(-1, 1)) / x.numel() for m in (exact, rounded)]
    assert losses[1].dtype == torch.float32
    assert abs(losses[0] - losses[1]) < 5e-3  # logits of size 0.3 to 8 bits, errors averaged over 128 tokens
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        error = (q.grad.float() - p.grad).norm() / p.grad.norm()
        assert error < 0.05, name  # 13 roundings of 2^-8 in a row


@pytest.mark.parametrize(
    ("shape", "masked"), [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False), ("qk-norm-geglu", False)]
)
def test_compiles_without_graph_breaks(build, shape, tokens, masked):
    model = build(shape)
    x, y = tokens(2, 16), tokens(4, 16)[2:]
    where = (torch.arange(16).expand(2, 16), torch.tensor([0, 5, 16, 32], dtype=torch.int32)) if masked else ()
    want = model.loss(x, y, *where)
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    got = torch.compile(model.loss, backend="aot_eager", fullgraph=True, dynamic=False)(x, y, *where)
    got.backward()
    assert_close(got, want, rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_compiles_in_bf16(build, tokens):
    model = build("gpt2", dtype=torch.bfloat16)
    x, y = tokens(2, 16), tokens(4, 16)[2:]
    want = torch.autograd.grad(model.loss(x, y), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True, dynamic=False)
    got = torch.autograd.grad(compiled(x, y), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        assert (a - b).float().norm() <= 2**-7 * b.float().norm()


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-1.5b", 1_557_611_200),
        ("llama3-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
    ],
)
def test_named_models_have_their_published_size_and_need_no_memory_to_be_counted(recipe, published):
    model = Transformer(load(recipe).model, kernels.choose("cpu"), dtype=torch.bfloat16, device="meta")
    assert sum(value.numel() for value in export_state(model).values()) == published
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_parameter_names_are_the_contract(build):
    def names(model):
        return {name for name, _ in model.named_parameters() if not name.startswith("blocks.1")}

    both = {"weight", "bias"}
    gpt2 = {"embed.weight", "positions.weight"} | {f"norm.{k}" for k in both}
    gpt2 |= {
        f"blocks.0.{m}.{k}" for m in ("norm1", "attn.qkv", "attn.out", "norm2", "mlp.up", "mlp.down") for k in both
    }
    assert names(build("gpt2")) == gpt2
    llama = {"embed", "norm", "head"} | {
        f"blocks.0.{m}"
        for m in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.out", "norm2", "mlp.gate_up", "mlp.down")
    }
    assert names(build("qk-norm-geglu")) == {f"{m}.weight" for m in llama}


@pytest.mark.parametrize("cuts", [(2,), (1, 3), (0, 4), (0, 0, 2)])
def test_pieces_of_a_model_are_the_model(build, shape, tokens, cuts):
    """Each fed the one tensor that the piece before returned: what pipeline stages run. Some hold no block at all."""
    whole = build(shape, layers=4)
    randomize(whole)
    x, y = tokens(2, 16), tokens(2, 16)
    bounds = [0, *cuts, 4]
    stream, held = None, set()
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        piece = Piece(number == 0, range(start, stop), number == len(cuts))
        part = Transformer(whole.cfg, whole.ops, piece=piece)
        names = {name for name, _ in part.named_parameters()}
        part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in names})
        held |= names
        stream = part.run(stream, x, y)
    assert held == {name for name, _ in whole.named_parameters()}
    assert_close(stream, whole.loss(x, y), rtol=1e-6, atol=0)


def test_decay_is_for_matrices(build):
    decayed = {name for name, p in build("gpt2").named_parameters() if decays(name, p)}
    assert "embed.weight" in decayed and "blocks.0.attn.qkv.weight" in decayed and "positions.weight" in decayed
    assert not any("norm" in name or name.endswith("bias") for name in decayed)


def test_building_touches_no_random_state(build):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    initialize(build("gpt2"), 1)
    assert torch.equal(torch.rand(3), want)
