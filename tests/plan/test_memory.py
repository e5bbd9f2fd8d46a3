"""Memory against published figures, by equality, and against what really stays alive, byte for byte."""

import importlib
from dataclasses import replace

import pytest
import torch
from alive import Alive
from torch.autograd.graph import get_gradient_edge

from megapre import kernels
from megapre.config import Batch, Config, Model, Optim, Run, load
from megapre.model.init import initialize
from megapre.model.transformer import Transformer
from megapre.plan import fullest_rank
from megapre.plan.activations import (
    ELEMENT,
    LOGITS_ROWS,
    MAX_LOGITS,
    layer_activations,
    logits_bytes,
    megatron_layer_activations,
    stage_activations,
)
from megapre.plan.buffers import Held, parameters
from megapre.plan.memory import all_ranks
from megapre.plan.params import layer as params_layer

GIB = 2**30

# Korthikanti et al. 2022, figure 1, GiB a GPU: (layers, hidden, heads, tp, pp, vpp, micro-batch) and
# (states, activations with nothing recomputed, with sequence parallelism and selective recomputation). s = 2048.
FIGURE_1 = {
    "22B": ((48, 6144, 64, 8, 1, 1, 4), (45.5625, 59.25, 9.5625)),
    "175B": ((96, 12288, 96, 8, 8, 3, 1), (45.5625, 66.84375, 12.3515625)),
    "530B": ((105, 20480, 128, 8, 35, 3, 1), (31.640625, 114.0234375, 23.076171875)),
    "1T": ((128, 25600, 160, 8, 64, 1, 1), (32.958984375, 131.25, 26.5625)),
}


@pytest.mark.parametrize("name", FIGURE_1)
def test_korthikanti_figure_1(name: str) -> None:
    (layers, hidden, heads, tp, pp, vpp, micro), (states, plain, selective) = FIGURE_1[name]
    assert 18 * 12 * layers * hidden**2 / (tp * pp) / GIB == states  # matrices of the layers only, as the figure
    held = layers * (1 + (pp - 1) / (pp * vpp) if vpp > 1 else 1)  # layers' worth on the first stage
    for recompute, sequence_parallel, published in (("none", False, plain), ("selective", True, selective)):
        one = megatron_layer_activations(micro * 2048, 2048, hidden, heads, tp, sequence_parallel, recompute)  # type: ignore[arg-type]
        assert held * one / GIB == published


def test_korthikanti_table_2() -> None:
    """The six rows, for s b h = 1 unit and 5 a s / h = 80."""
    unit, args = 2048 * 12288, (2048, 2048, 12288, 96)
    rows = [(1, False, "none", 34 + 80), (8, False, "none", 10 + 24 / 8 + 80 / 8), (8, True, "none", (34 + 80) / 8)]
    rows += [(8, False, "selective", 10 + 24 / 8), (8, True, "selective", 34 / 8), (8, True, "full", 2)]
    for tp, sequence_parallel, recompute, factor in rows:
        assert megatron_layer_activations(*args, tp, sequence_parallel, recompute) == factor * unit  # type: ignore[arg-type]


SHAPES = [
    {"family": "gpt2", "hidden": 64, "heads": 4},
    {"family": "gpt2", "hidden": 64, "heads": 4, "bias": False, "ffn": 160},
    {"family": "llama", "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 160},
    {"family": "llama", "hidden": 64, "heads": 4, "head_dim": 32, "ffn": 96, "tied": True},
]


def kept_alive(model: Model, tokens_BS: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes, beside the model's own, that the graph of the loss holds."""
    rms_norm = importlib.import_module("megapre.kernels.rms_norm").native  # runs in plain torch without the library
    built = Transformer(model, replace(kernels.choose("cpu"), rms_norm=rms_norm), dtype=dtype)
    initialize(built, 0)
    own = [*built.parameters()]
    if built.rotary is not None:
        own += [built.rotary.cos, built.rotary.sin]
    with Alive(own) as alive:
        edge = get_gradient_edge(built.loss(tokens_BS, tokens_BS))
        kept = alive.bytes()
    assert edge.node is not None
    return kept


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_stays_alive(shape: dict[str, object], name: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    tokens_BS = torch.arange(64).view(2, 32)
    models = [Model.model_validate({**shape, "layers": n, "context": 32, "vocab": 200}) for n in (1, 3)]
    one, three = (kept_alive(model, tokens_BS, dtype) for model in models)
    assert three - one == 2 * layer_activations(models[0], 64, ELEMENT[name])

    batch = Batch(micro=2, global_=2, seq_length=32)
    run = Run(steps=1, dtype=name)
    memory = fullest_rank(Config(model=models[0], batch=batch, optim=Optim(lr=1e-3), run=run))
    head_gradient = 4 * models[0].vocab_padded * 64  # counted with the logits
    assert one == memory.activations + head_gradient


def test_the_chunks_of_logits_are_those_of_the_kernel() -> None:
    linear_cross_entropy = importlib.import_module("megapre.kernels.linear_cross_entropy")
    assert linear_cross_entropy.MAX_LOGITS == MAX_LOGITS
    model = Model(family="gpt2", layers=1, hidden=64, heads=1, context=8, vocab=50257)
    for device, most in MAX_LOGITS.items():
        for tokens in (1, 100, 4096, 65536):
            chunk = linear_cross_entropy.chunk_rows(tokens, model.vocab_padded, most) * model.vocab_padded
            head = {"cpu": 0, "cuda": 4 + 4}[device] * model.vocab_padded * 64
            assert logits_bytes(model, tokens, 2, device=device) == 2 * chunk + head
    assert linear_cross_entropy.LEAST_ROWS == LOGITS_ROWS


# GiB that torch 2.11's allocator had given out at the peak of a second step on an H200, 2026-11-20, cross-entropy
# composed of torch's operations and rope keeping q and k before their turn: recipe, overrides, peak.
MEASURED = [
    ("gpt2-124m", ["batch.micro=8"], 9.955),
    ("gpt2-124m", ["batch.micro=32"], 16.766),
    ("gpt2-124m", ["batch.micro=8", "run.dtype=fp32"], 11.178),
    ("llama3-1b", ["batch.micro=1"], 38.563),
    ("llama3-1b", ["batch.micro=2", "model.tied=false"], 52.951),
]


@pytest.mark.parametrize(("recipe", "overrides", "peak"), MEASURED)
def test_peaks_measured_on_a_gpu(recipe: str, overrides: list[str], peak: float) -> None:
    cfg = load(recipe, overrides)
    rope = (cfg.model.heads + cfg.model.kv_heads) * cfg.model.head_dim if cfg.model.positions == "rope" else 0
    unturned = 2 * cfg.batch.micro * cfg.batch.seq_length * cfg.model.layers * rope
    predicted = (fullest_rank(cfg, device="cuda", fused_loss=False).total + unturned) / GIB
    assert predicted == pytest.approx(peak, rel=0.01)  # cuBLAS's workspace, and blocks rounded up


def layout(recipe: str, **sizes: object) -> Config:
    return load(recipe, [f"{key.replace('_', '.', 1)}={value}" for key, value in sizes.items()])


def test_states_are_eighteen_bytes_a_parameter_and_sharded_six_and_twelve() -> None:
    cfg = load("gpt2-124m")
    held = sum(parameter.elements for parameter in parameters(cfg.model, 1, Held(12, True, True)))
    one = fullest_rank(cfg)
    assert one.weights + one.gradients + one.master + one.moments == 18 * held
    eight = fullest_rank(cfg, dp=8)
    assert eight.weights + eight.gradients == 6 * held
    assert eight.master + eight.moments == 12 * held / 8
    apart = fullest_rank(load("gpt2-124m", ["layout.shard_optimizer=false"]), dp=8)
    assert apart == one  # every replica keeps all
    single = fullest_rank(layout("gpt2-124m", run_dtype="fp32"))
    assert (single.weights, single.master) == (4 * held, 0)  # fp32 weights are their own master
    bare = fullest_rank(load("gpt2-124m", ["optim.master=none"]))
    assert (bare.weights, bare.master, bare.moments) == (2 * held, 0, 8 * held)
    assert fullest_rank(load("gpt2-124m", ["optim.master=none", "optim.moments=bf16"])).moments == 4 * held
    assert fullest_rank(load("gpt2-124m", ["run.dtype=fp16"])) == one
    assert fullest_rank(load("gpt2-124m", ["optim.grad_dtype=bf16"])) == replace(one, gradients=2 * held)
    assert one.total == sum(value for key, value in one.as_json().items() if key != "total")


def test_interleaved_first_rank_holds_the_published_share() -> None:
    cfg = layout("gpt2-124m", layout_pp=2, layout_vpp=3)
    p, v = 2, 3
    chunk = stage_activations(cfg, (2,) * 6)[1].whole
    first = all_ranks(cfg)[0].activations - 2 * p * 8 * cfg.batch.micro_tokens  # tokens of chunk 0: 2 p of them
    assert first / (v * chunk) == p * (1 + (p - 1) / (p * v))


def test_first_and_last_stage() -> None:
    cfg = layout("llama3-8b", layout_pp=4)
    ranks = all_ranks(cfg)
    assert ranks[0].activations > ranks[1].activations > ranks[2].activations > ranks[3].activations
    assert [memory.logits > 0 for memory in ranks] == [False, False, False, True]
    assert ranks[0].weights > ranks[1].weights == ranks[2].weights < ranks[3].weights
    assert fullest_rank(cfg).total == max(memory.total for memory in ranks)


def test_the_last_rank_of_gpipe_keeps_what_the_loss_hands_back_of_every_micro_batch() -> None:
    cfg = layout("llama3-8b", layout_pp=4, layout_tp=1, layout_schedule="gpipe", batch_global=8, batch_micro=1)
    kept = stage_activations(cfg, (8,) * 4)
    assert all_ranks(cfg)[3].activations == 8 * kept[3].whole
    assert kept[3].whole - kept[2].whole == cfg.batch.seq_length * (2 * 2 * cfg.model.hidden + 4)


def test_both_ends_lie_on_the_first_rank_of_a_v() -> None:
    cfg = layout("llama3-8b", layout_pp=4, layout_vpp=2, layout_schedule="dualpipev")
    ranks = all_ranks(cfg)
    assert [memory.logits > 0 for memory in ranks] == [True, False, False, False]
    assert ranks[0].weights > ranks[1].weights == ranks[3].weights
    loop = all_ranks(layout("llama3-8b", layout_pp=4, layout_vpp=2))
    assert sum(memory.weights for memory in ranks) == sum(memory.weights for memory in loop)


def test_tensor_and_sequence_parallel_shares() -> None:
    model = load("llama3-8b").model
    whole = layer_activations(model, 8192, 2)
    assert layer_activations(model, 8192, 2, tp=8) * 8 == whole
    with_whole_norms = layer_activations(model, 8192, 2, tp=8, sequence_parallel=False)
    outer = 8192 * (2 * 4 * model.hidden + 2 * 4)
    assert with_whole_norms * 8 == whole + 7 * outer


def test_stages_given_by_the_user_are_what_ranks_hold() -> None:
    given = layout("llama3-8b", layout_tp=1, layout_pp=4, layout_stages=[9, 9, 8, 6])
    equal = layout("llama3-8b", layout_tp=1, layout_pp=4)
    layer = sum(params_layer(equal.model)[:3])
    for rank, (more, ours, theirs) in enumerate(zip((1, 1, 0, -2), all_ranks(given), all_ranks(equal), strict=True)):
        assert ours.weights - theirs.weights == 2 * more * layer
        one = layer_activations(equal.model, equal.batch.micro_tokens, 2)
        assert ours.activations - theirs.activations == more * one * (4 - rank)
