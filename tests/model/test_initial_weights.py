"""A parameter's first value depends on seed and name alone."""

import math

import pytest
import torch

from megapre import kernels
from megapre.config import Model
from megapre.model import ModelError, Transformer, export_state, initialize, load_state


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_values_do_not_depend_on_what_else_exists(build):
    small, large = weights(build("llama", layers=2)), weights(build("llama", layers=2, tied=True, qk_norm=True))
    shared = small.keys() & large.keys()
    assert len(shared) == len(small) - 1
    assert all(torch.equal(small[name], large[name]) for name in shared)


def test_depth_changes_only_the_scale_of_residual_outputs(build):
    two, eight = weights(build("gpt2", layers=2)), weights(build("gpt2", layers=8))
    for name, value in two.items():
        scale = 2.0 if name.endswith(("attn.out.weight", "mlp.down.weight")) else 1.0  # sqrt(16) / sqrt(4)
        torch.testing.assert_close(value, eight[name] * scale, rtol=1e-6, atol=0)


def test_true_rows_do_not_depend_on_padding(build, monkeypatch):
    # 131 * 44 is no multiple of 16: torch fills in blocks of 16, and the last block depends on where the tensor ends.
    odd = {"vocab": 131, "hidden": 44, "tied": False}
    usual = build("gpt2", **odd)
    monkeypatch.setattr("megapre.config.schema.VOCAB_MULTIPLE", 1024)
    wide = build("gpt2", **odd)
    assert wide.embed.weight.shape[0] == 1024 and usual.embed.weight.shape[0] == 256
    for name in ("embed", "head"):
        few, many = usual.get_submodule(name).weight, wide.get_submodule(name).weight
        assert torch.equal(few[:131], many[:131]) and few[:131].all()
        assert not few[131:].any() and not many[131:].any()


def test_bf16_is_the_rounded_fp32_draw(build, shape):
    exact, rounded = weights(build(shape)), weights(build(shape, dtype=torch.bfloat16))
    assert all(torch.equal(value.bfloat16(), rounded[name]) for name, value in exact.items())


def test_seeds_and_names_give_different_draws_and_repeat(build):
    model = build("gpt2", seed=1)
    again, other = weights(build("gpt2", seed=1)), weights(build("gpt2", seed=2))
    for name, value in weights(model).items():
        assert torch.equal(value, again[name])
        assert (name.endswith("bias") or value.ndim == 1) == torch.equal(value, other[name]), name
    blocks = model.blocks
    assert not torch.equal(blocks[0].attn.qkv.weight, blocks[1].attn.qkv.weight)
    assert not torch.equal(blocks[0].attn.qkv.weight[:48], blocks[0].attn.out.weight * 2)


def test_first_values_are_pinned(build):
    """A checkpointless rerun of an old recipe starts from the same weights. Box-Muller in SIMD: equal to some ulps."""
    model = build("gpt2", seed=1234)
    want = torch.tensor([0.00146731467, -0.00696495222, 0.0266374089, -0.00362482504])
    torch.testing.assert_close(model.blocks[1].mlp.down.weight.flatten()[:4], want, rtol=1e-5, atol=1e-8)


def test_scales(build):
    model = build("gpt2", hidden=256, heads=4, ffn=1024, layers=3, init_std=0.05, vocab=1000)
    for name, p in weights(model).items():
        if p.ndim == 1:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p))
            continue
        p = p[:1000] if name == "embed.weight" else p
        std = 0.05 / math.sqrt(6) if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.05
        count = p.numel()
        # 5 standard errors of the mean and of the standard deviation of `count` normal numbers
        assert abs(p.mean()) < 5 * std / math.sqrt(count), name
        assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * count), name


def test_state_leaves_with_true_rows_and_returns(build, shape):
    model, other = build(shape, vocab=130), build(shape, vocab=130, seed=9)
    state = export_state(model)
    assert state["embed.weight"].shape[0] == 130
    with torch.no_grad():
        other.embed.weight[130:] = 7.0  # whatever was there
    load_state(other, {name: value.clone() for name, value in state.items()})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_alien_state_is_refused_whole(build):
    model = build("llama")
    before = weights(model)
    state = {name: value + 1 for name, value in export_state(build("llama", seed=2)).items()}
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][1:]
    state["surprise"] = state.pop("norm.weight")
    with pytest.raises(ModelError) as caught:
        load_state(model, state)
    for part in ("missing: norm.weight (48,)", "not in this model: surprise", "(143, 48), the model has (144, 48)"):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_a_materialised_meta_model_is_the_same_model(build, tokens):
    """Rotary tables are no state: to_empty and casts must bring them back exact and in fp32."""
    want = build("llama")
    model = Transformer(want.cfg, kernels.choose("cpu"), device="meta").to_empty(device="cpu")
    initialize(model, 1)
    x = tokens(2, 16)
    assert torch.equal(model(x), want(x))
    assert "rotary.cos" not in model.state_dict()
    model.bfloat16().float()
    assert torch.equal(model.rotary.cos, want.rotary.cos)


def test_seed_zero_and_the_largest_work():
    cfg = Model(family="gpt2", layers=1, hidden=8, heads=1, vocab=10, context=4)
    model = Transformer(cfg, kernels.choose("cpu"))
    for seed in (0, 2**32 - 1):
        initialize(model, seed)
        assert all(p.isfinite().all() for p in model.parameters())
