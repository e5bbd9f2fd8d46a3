"""The parity law: the same recipe gives the same fp32 losses under every layout.

Ten steps of a small model on eight ranks or fewer, against one rank that sees the same global batches. Compared: the
loss and the gradient norm of every step, each gradient of step 1 and each parameter after step 10, gathered from
whatever rank holds a part of it.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn
from torch import Tensor

from megapre.config import Config
from megapre.data import GlobalBatch, MicroBatch
from megapre.model.cut import held
from megapre.parallel.comm import Place
from megapre.schedule import build, write
from megapre.train.stage import parameters
from megapre.train.step import Engine, connected

STEPS, SAMPLES, LENGTH, LR = 10, 12, 16, 1e-3
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "ffn": 40},
    "llama, two kv heads, tied": {"family": "llama", "ffn": 40, "kv_heads": 2, "tied": True},
    "llama, one kv head, norms in heads": {"family": "llama", "ffn": 40, "kv_heads": 1, "qk_norm": True},
}


class Found(NamedTuple):
    losses: list[float]
    norms: list[float]
    gradients: dict[str, tuple[Any, Tensor]]
    """By name what the rank holds of the parameter (megapre.model.cut.Held), and its gradient in step 1."""
    parameters: dict[str, tuple[Any, Tensor]]


def config(model: str, dtype: str, layout: dict[str, Any], **batch: int) -> Config:
    """Micro-batches of one sample, but of four where tensors are cut and there is no pipeline to fill: each micro-batch
    takes some twenty collectives more, which the ranks spend their time on.
    """
    shape = {"layers": 4, "hidden": 32, "heads": 4, "context": LENGTH, "vocab": 200}
    micro = 4 if layout.get("tp", 1) > 1 and layout.get("pp", 1) == 1 else 1
    return Config.model_validate(
        {
            "model": shape | MODELS[model],
            "layout": layout,
            "batch": {"micro": micro, "global": SAMPLES, "seq_length": LENGTH, **batch},
            "optim": {"lr": LR, "clip": 0.5},
            "run": {"steps": STEPS, "dtype": dtype, "device": "cpu", "seed": 5},
        }
    )


def share_of_batch(cfg: Config, step: int, replica: int, replicas: int) -> GlobalBatch:
    """One rank's micro-batches, cut as the loader cuts them; some labels have no loss."""
    samples, micro = cfg.batch.global_, cfg.batch.micro
    generator = torch.Generator().manual_seed(step)
    lines = torch.randint(200, (samples, LENGTH + 1), generator=generator)
    labels = lines[:, 1:].masked_fill(torch.rand(samples, LENGTH, generator=generator) < 0.1, -100)
    mine = [slice(i, i + micro) for i in range(replica * micro, samples, replicas * micro)]
    parts = tuple(MicroBatch(lines[i, :-1].clone(), labels[i], None, None) for i in mine)
    return GlobalBatch(parts, sum(int((part.labels >= 0).sum()) for part in parts), samples)


def train(cfg: Config) -> Found:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    place = Place(dist.get_rank(), ranks, dist.get_rank(), ranks) if ranks > 1 else Place()
    engine = Engine(cfg, torch.device("cpu"), connected(cfg, place, torch.device("cpu")))
    groups, tp = engine.groups, engine.groups.tp
    place_of = {
        name: held(name, value.shape, cfg.model, tp.index, tp.size) for name, value in parameters(engine.models)
    }
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        result = engine.step(share_of_batch(cfg, step, groups.dp.index, groups.dp.size), LR)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
        if step == 0:
            gradients = {name: (place_of[name], grad.clone()) for name, grad in own_gradients(engine).items()}
    engine.settle()
    weights = {name: (place_of[name], value.detach().clone()) for name, value in parameters(engine.models)}
    return Found(losses, norms, gradients, weights)


def own_gradients(engine: Engine) -> dict[str, Tensor]:
    """The summed gradients where this rank has them, NaN where another replica keeps them."""
    found = {}
    for group in engine.flat.groups:
        known = torch.full_like(group.grad, torch.nan)
        for piece in group.pieces():
            known[piece.start : piece.start + len(piece.grad)] = piece.grad
        found |= {name: slot.view(known) for name, slot in group.slots.items()}
    return found


def assembled(parts: list[dict[str, tuple[Any, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors from what the ranks hold. Where several have an element, they must agree to a rounding."""
    whole: dict[str, Tensor] = {}
    for rank in parts:
        for name, (place, part) in rank.items():
            target = whole.setdefault(name, torch.full(place.shape, torch.nan))
            for there, here in place.pieces(target, part):
                both = ~(there.isnan() | here.isnan())
                torch.testing.assert_close(there[both], here[both], rtol=1e-5, atol=1e-7)
                there.copy_(torch.where(here.isnan(), there, here))
    return whole


@functools.cache
def alone(model: str, dtype: str) -> Found:
    return train(config(model, dtype, {}))


def compare(found: list[Found], expected: Found, first: float, last: float, gradients: float, weights: float) -> None:
    """Relative bounds: on the loss of the first and the last step (norms: ten times), and on a tensor's gradient in
    step 1, where what is nothing but rounding (that of a key's bias) may be off by 1e-7 of the whole gradient.
    `weights` is relative to the longest way that AdamW can have moved a tensor.
    """
    for rank in found:
        assert rank[:2] == found[0][:2], "loss and norm are the same on every rank"
    losses, norms = found[0][:2]
    for step, (loss, want) in enumerate(zip(losses, expected.losses, strict=True)):
        bound = first * (last / first) ** (step / (STEPS - 1))
        assert loss == pytest.approx(want, rel=bound), f"loss of step {step + 1}"
        assert norms[step] == pytest.approx(expected.norms[step], rel=10 * bound), f"norm of step {step + 1}"
    for name, value in together([rank.gradients for rank in found], expected.gradients):
        want = assembled([expected.gradients])[name]
        assert torch.dist(value, want) <= gradients * want.norm() + 1e-7 * norms[0], f"gradient of {name}"
    for name, value in together([rank.parameters for rank in found], expected.parameters):
        want = assembled([expected.parameters])[name]
        assert torch.dist(value, want) <= weights * STEPS * LR * want.numel() ** 0.5, f"parameter {name}"


def together(parts: list[dict[str, Any]], expected: dict[str, Any]) -> list[tuple[str, Tensor]]:
    whole = assembled(parts)
    assert whole.keys() == expected.keys()
    for name, value in whole.items():
        assert not value.isnan().any(), f"nobody has all of {name}"
    return list(whole.items())


GPT2, LLAMA, TWO_HEADS, ONE_HEAD = MODELS
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tp2": ({"tp": 2, "sequence_parallel": False}, (GPT2, TWO_HEADS)),
    "tp4": ({"tp": 4, "sequence_parallel": False}, (LLAMA, ONE_HEAD)),
    "tp2 sp": ({"tp": 2}, (GPT2, ONE_HEAD)),
    "tp4 sp ring": ({"tp": 4, "overlap_products": True}, (TWO_HEADS,)),
    "pp2": ({"pp": 2}, (GPT2, LLAMA)),
    "pp4": ({"pp": 4}, (TWO_HEADS,)),
    "pp2 gpipe": ({"pp": 2, "schedule": "gpipe"}, (LLAMA,)),
    "pp2 vpp2": ({"pp": 2, "vpp": 2}, (GPT2, LLAMA)),
    "pp4 vpp1 zb_h1": ({"pp": 4, "schedule": "zb_h1"}, (GPT2,)),
    "pp2 vpp2 breadth first": ({"pp": 2, "vpp": 2, "schedule": "breadth_first"}, (TWO_HEADS,)),
    "pp2 zbv": ({"pp": 2, "vpp": 2, "schedule": "zbv"}, (GPT2, LLAMA)),
    "pp2 dualpipev": ({"pp": 2, "vpp": 2, "schedule": "dualpipev"}, (TWO_HEADS,)),
    "dp2": ({"dp": 2}, (GPT2,)),
    "dp4 sharded": ({"dp": 4}, (LLAMA,)),
    "dp4 whole": ({"dp": 4, "shard_optimizer": False}, (TWO_HEADS,)),
    "tp2 pp2 dp2 1f1b": ({"tp": 2, "pp": 2, "dp": 2}, (GPT2,)),
    "tp2 pp2 dp2 gpipe": ({"tp": 2, "pp": 2, "dp": 2, "schedule": "gpipe"}, (ONE_HEAD,)),
    "tp2 pp2 dp2 interleaved": ({"tp": 2, "pp": 2, "dp": 2, "vpp": 2}, (TWO_HEADS,)),
    "tp2 pp2 dp2 breadth first": ({"tp": 2, "pp": 2, "dp": 2, "vpp": 2, "schedule": "breadth_first"}, (LLAMA,)),
    "tp2 pp2 dp2 zb_h1": ({"tp": 2, "pp": 2, "dp": 2, "schedule": "zb_h1"}, (GPT2,)),
    "tp2 pp2 dp2 zbv": ({"tp": 2, "pp": 2, "dp": 2, "vpp": 2, "schedule": "zbv"}, (GPT2, ONE_HEAD)),
    "tp2 pp2 dp2 dualpipev": ({"tp": 2, "pp": 2, "dp": 2, "vpp": 2, "schedule": "dualpipev"}, (LLAMA,)),
    "pp2 dp2, stages of 3 and 1": ({"pp": 2, "dp": 2, "stages": [3, 1]}, (GPT2,)),
    "pp2, recomputed": ({"pp": 2, "recompute": ["block", "norm"], "recompute_layers": 1}, (LLAMA,)),
    "tp2 pp2 recomputed": ({"tp": 2, "pp": 2, "recompute": ["norm", "activation"]}, (GPT2,)),
}


def ranks_of(layout: dict[str, Any]) -> int:
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)


@pytest.mark.parametrize(
    ("layout", "model"), [(name, model) for name, (_, found) in LAYOUTS.items() for model in found]
)
def test_fp32_losses_are_those_of_one_rank(run_on: RunOn, model: str, layout: str) -> None:
    asked, _ = LAYOUTS[layout]
    found = run_on(ranks_of(asked), train, config(model, "fp32", asked))
    compare(found, alone(model, "fp32"), first=1e-6, last=1e-5, gradients=1e-5, weights=1e-4)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ({"pp": 2}, TWO_HEADS),
        ({"tp": 2, "sequence_parallel": False}, GPT2),
        ({"tp": 2, "sequence_parallel": False}, ONE_HEAD),
        ({"tp": 2, "pp": 2, "dp": 2}, TWO_HEADS),
    ],
)
def test_copies_of_bf16_weights_are_rounded_alike(run_on: RunOn, layout: dict[str, Any], model: str) -> None:
    """Without a master each update rounds at random: ranks that hold the same parameter must draw the same bits."""
    cfg = config(model, "bf16", layout)
    cfg = cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"master": "none"})})
    found = run_on(ranks_of(layout), train, cfg)
    assembled([{name: (place, part.float()) for name, (place, part) in rank.parameters.items()} for rank in found])


def test_a_schedule_from_a_file_runs_as_planned(run_on: RunOn, tmp_path: Path) -> None:
    """A V with a tied model, whose ends therefore share one table."""
    path = str(tmp_path / "mine.txt")
    write(build("dualpipev", 2, 2, SAMPLES), path)
    found = run_on(2, train, config(GPT2, "fp32", {"pp": 2, "vpp": 2, "schedule": path}))
    compare(found, alone(GPT2, "fp32"), first=1e-6, last=1e-5, gradients=1e-5, weights=1e-4)


@pytest.mark.parametrize(("samples", "micro"), [(10, 1), (6, 3), (2, 1)])
def test_any_number_of_micro_batches(run_on: RunOn, samples: int, micro: int) -> None:
    """Five, one and one a rank: fewer than the pipeline is deep."""
    asked = {"pp": 2, "dp": 2}
    batch = {"global": samples, "micro": micro}
    expected = train(config(LLAMA, "fp32", {}, **batch))
    found = run_on(4, train, config(LLAMA, "fp32", asked, **batch))
    compare(found, expected, first=1e-6, last=1e-5, gradients=1e-5, weights=1e-4)


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2 vpp2", "dp2", "tp2 pp2 dp2 zbv"])
def test_bf16_losses_are_those_of_one_rank_but_for_rounding(run_on: RunOn, layout: str) -> None:
    """Partial sums of tp are rounded before they are added, and so is the stream between stages: 2^-9 of a value each.
    Losses of ten steps were seen to differ by up to 3e-5 of themselves, norms by 2e-3; five times that is allowed.
    """
    asked, _ = LAYOUTS[layout]
    found = run_on(ranks_of(asked), train, config(GPT2, "bf16", asked))
    expected = alone(GPT2, "bf16")
    assert found[0].losses == pytest.approx(expected.losses, rel=1.5e-4)
    assert found[0].norms == pytest.approx(expected.norms, rel=1e-2)
