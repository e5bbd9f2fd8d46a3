"""The same weights compute the same thing here and in Hugging Face transformers, and survive the way there and back."""

import json
import logging
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megapre import kernels
from megapre.config import Model
from megapre.interop.huggingface import InteropError, from_hf, to_hf
from megapre.model import Transformer, export_state, generate, initialize, load_state

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

GPT2 = {"architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 48, "n_head": 4, "n_positions": 40}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 16}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, "vocab_size": 211},
    "gpt2-untied-narrow-ffn": {**GPT2, "vocab_size": 300, "tie_word_embeddings": False, "n_inner": 100},
    "gpt2-one-deep-head": {**GPT2, "vocab_size": 128, "n_head": 1, "n_layer": 5, "layer_norm_epsilon": 1e-3},
    "gpt2-tanh-name": {**GPT2, "vocab_size": 211, "activation_function": "gelu_pytorch_tanh"},
    "llama": {**LLAMA, "vocab_size": 211},
    "llama-gqa-tied": {**LLAMA, "vocab_size": 211, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-mqa-wide-heads": {**LLAMA, "vocab_size": 300, "num_key_value_heads": 1, "head_dim": 32},
    "llama-biases": {**LLAMA, "vocab_size": 211, "attention_bias": True, "mlp_bias": True},
    "llama-deep-theta": {**LLAMA, "vocab_size": 128, "num_hidden_layers": 6, "rope_theta": 5e5},
    "llama-linear": {**LLAMA, "vocab_size": 211, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama-old-linear": {**LLAMA, "vocab_size": 211, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama-llama3": {**LLAMA, "vocab_size": 211, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
    "llama-geglu": {**LLAMA, "vocab_size": 211, "hidden_act": "gelu_pytorch_tanh"},
    "qwen3": {**QWEN3, "vocab_size": 211},
    "qwen3-tied-eps": {**QWEN3, "vocab_size": 300, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
}


def hugging_face(config: dict[str, Any], seed: int = 1) -> Any:
    """Their model with random weights, norms and biases included, so that no term hides behind a 0 or a 1."""
    kind = config["architectures"][0]
    cfg = getattr(transformers, kind.replace("LMHeadModel", "").replace("ForCausalLM", "") + "Config")(**config)
    cfg._attn_implementation = "eager"
    model = getattr(transformers, kind)(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.empty(p.shape).normal_(0, 0.1, generator=generator)
            p.copy_(noise + 1 if p.ndim == 1 and not name.endswith("bias") else noise)
    return model


def ours(config: dict[str, Any], state: dict[str, torch.Tensor]) -> Transformer:
    cfg, weights = from_hf(config, state)
    model = Transformer(cfg, kernels.choose("cpu"))
    load_state(model, weights)
    return model


def batch(vocab: int, length: int = 40) -> torch.Tensor:
    return torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_every_gradient_agree(name):
    config = CONFIGS[name]
    theirs = hugging_face(config)
    model = ours(config, theirs.state_dict())
    x = batch(config["vocab_size"])
    labels = x.roll(-1, 1)
    labels[:, -1] = -100

    out = theirs(x, labels=x)
    logits = model(x)
    assert out.logits.abs().max() > 0.5  # the comparison has something to compare
    assert_close(logits, out.logits, rtol=0, atol=1e-5)

    loss = model.loss(x, labels) / (labels >= 0).sum()
    assert_close(loss, out.loss, rtol=1e-6, atol=0)

    out.loss.backward()
    loss.backward()
    _, gradients = from_hf(config, {name: p.grad for name, p in theirs.named_parameters()})
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        want, got = gradients[name], p.grad[: model.cfg.vocab] if name in ("embed.weight", "head.weight") else p.grad
        assert (got - want).norm() <= 1e-4 * want.norm(), name
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), name


def test_rotary_tables_agree_to_the_last_position_of_llama_3():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = {"max_position_embeddings": 131072, "head_dim": 128, "num_hidden_layers": 1, "vocab_size": 8}
    rope = {**LLAMA3_ROPE, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    config = {**LLAMA, **shape, "rope_parameters": rope}
    cos, sin = LlamaRotaryEmbedding(transformers.LlamaConfig(**config))(torch.zeros(1), torch.arange(131072)[None])
    state = hugging_face(config).state_dict()
    rotary = ours(config, state).rotary
    for table, theirs in ((rotary.cos, cos), (rotary.sin, sin)):
        # One frequency off by its last bit would be 131072 * 2^-24 = 8e-3 rad at the end.
        assert_close(table, theirs[0, :, :64], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bitwise(name):
    config = CONFIGS[name]
    state = {k: v.clone() for k, v in hugging_face(config).state_dict().items()}
    cfg, weights = from_hf(config, state)
    assert weights["embed.weight"].shape[0] == config["vocab_size"]
    back_config, back = to_hf(cfg, weights)
    assert back_config["architectures"] == config["architectures"]
    assert cfg == from_hf(json.loads(json.dumps(back_config)), back)[0]
    if cfg.tied:
        state.pop("lm_head.weight")
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value) and back[key].is_contiguous(), key


@pytest.mark.parametrize("name", ["gpt2", "llama-llama3", "llama-old-linear", "llama-biases", "qwen3-tied-eps"])
def test_an_exported_model_runs_there(name, tmp_path):
    """From our padded, initialised model through a folder that from_pretrained reads."""
    from safetensors.torch import save_file

    cfg, _ = from_hf(CONFIGS[name], hugging_face(CONFIGS[name]).state_dict())
    model = Transformer(cfg, kernels.choose("cpu"))
    initialize(model, 5)
    config, state = to_hf(cfg, export_state(model))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = getattr(transformers, config["architectures"][0]).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    x = batch(cfg.vocab)
    with torch.no_grad():
        assert_close(model(x), theirs.eval()(x).logits, rtol=0, atol=1e-5)


def test_what_they_save_is_read(tmp_path):
    """config.json as save_pretrained writes it, with whatever this release of transformers puts into it."""
    for name in ("gpt2", "llama-llama3", "llama-linear", "qwen3"):
        theirs = hugging_face(CONFIGS[name])
        theirs.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert from_hf(config, theirs.state_dict())[0] == from_hf(CONFIGS[name], theirs.state_dict())[0]


def test_greedy_generation_agrees():
    config = CONFIGS["qwen3"]
    theirs = hugging_face(config)
    x = batch(config["vocab_size"], 6)
    want = theirs.generate(x, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 6:]
    got = torch.stack([step.tokens_B for step in generate(ours(config, theirs.state_dict()), x, 20, temperature=0)], 1)
    assert torch.equal(got, want)


def test_old_checkpoints_are_read():
    """GPT-2's published files: no `transformer.` prefix, mask buffers among the weights, a tied matrix twice."""
    state = hugging_face(CONFIGS["gpt2"]).state_dict()
    old = {name.removeprefix("transformer."): value for name, value in state.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    want, got = from_hf(CONFIGS["gpt2"], state)[1], from_hf(CONFIGS["gpt2"], old)[1]
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ("llama", {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM .* GPT2LMHeadModel, LlamaForCausalLM"),
        ("llama", {"architectures": None}, "none named"),
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu'; possible here: silu or"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "'yarn'; possible here: default, linear, llam",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_type = 'linear' needs factor"),
        ("llama", {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": None}}, "'llama3' needs low_freq_factor"),
        ("llama", {"attention_bias": True}, "attention_bias = True; possible here: False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5; possible here: 1.0"),
        ("llama", {"num_hidden_layers": "two"}, "layers = 'two'"),
        ("llama", {"hidden_size": "wide"}, "hidden = 'wide'"),
        ("llama", {"num_attention_heads": 5}, "hidden = 48 is not a whole number of heads = 5"),
        ("llama", {"num_key_value_heads": 3}, "heads = 4 cannot share kv_heads = 3"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'; possible here: gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ],
)
def test_what_cannot_be_mapped_is_refused(config, change, message):
    with pytest.raises(InteropError, match=message):
        from_hf({**CONFIGS[config], **change}, {})


def test_all_refusals_come_together():
    with pytest.raises(InteropError, match=r"(?s)hidden_act.*rope_type"):
        from_hf({**CONFIGS["llama"], "hidden_act": "relu", "rope_scaling": {"rope_type": "yarn"}}, {})


def test_weights_that_do_not_fit_are_refused():
    config, state = CONFIGS["llama"], hugging_face(CONFIGS["llama"]).state_dict()
    del state["model.norm.weight"]
    state["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(47, 48)
    state["model.layers.7.input_layernorm.weight"] = torch.zeros(48)
    with pytest.raises(InteropError) as caught:
        from_hf(config, state)
    for part in ("missing: model.norm.weight", "part of the architecture: model.layers.7", "(47, 48)", "implies 48"):
        assert part in str(caught.value)
    state = hugging_face(CONFIGS["gpt2"]).state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(InteropError, match=r"lm_head\.weight differs from the embedding"):
        from_hf(CONFIGS["gpt2"], state)


def test_padded_or_missing_weights_are_not_exported():
    cfg, state = from_hf(CONFIGS["llama"], hugging_face(CONFIGS["llama"]).state_dict())
    padded = {**state, "head.weight": torch.zeros(256, 48)}
    with pytest.raises(InteropError, match=r"implies 211 rows of head\.weight; the weights have 256"):
        to_hf(cfg, padded)
    del state["norm.weight"]
    with pytest.raises(InteropError, match=r"48 rows of norm\.weight; the weights have none"):
        to_hf(cfg, state)


def test_a_model_without_counterpart_is_not_exported():
    cfg = Model(family="gpt2", layers=1, hidden=8, heads=2, vocab=10, context=4, positions="rope", bias=False)
    with pytest.raises(InteropError) as caught:
        to_hf(cfg, {})
    assert "GPT2LMHeadModel has no rope positions, no way to leave biases out" in str(caught.value)
    assert "LlamaForCausalLM has no layernorm, no gelu" in str(caught.value)
