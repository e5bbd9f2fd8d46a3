"""The training step: accumulation, normalisation by valid tokens, precision, NaN, and no waiting for the device."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapre.config import Config, load
from megapre.data import DataError, GlobalBatch, MicroBatch
from megapre.mesh import MeshError
from megapre.parallel.comm import Place
from megapre.train.bench import made_up
from megapre.train.step import Engine, connected

CPU = torch.device("cpu")


def debug(*overrides: str) -> Config:
    return load("debug", ["model.vocab=300", *overrides])


def gradients(engine: Engine) -> dict[str, Tensor]:
    return {name: grad.clone() for name, grad in engine.flat.named(lambda group: group.grad).items()}


def recut(batch: GlobalBatch, micro: int) -> GlobalBatch:
    """The same sequences in micro-batches of another size."""
    tokens, labels = (torch.cat([getattr(p, f) for p in batch.micro_batches]) for f in ("tokens", "labels"))
    parts = [MicroBatch(t, y, None, None) for t, y in zip(tokens.split(micro), labels.split(micro), strict=True)]
    return GlobalBatch(tuple(parts), batch.valid_tokens, batch.samples)


def with_holes(batch: GlobalBatch) -> GlobalBatch:
    """Takes the loss off a different number of tokens in each sequence."""
    for part in batch.micro_batches:
        for row, labels in enumerate(part.labels):
            labels[: 3 + 17 * row + int(part.tokens[0, 0]) % 30] = -100
    valid = sum(int((part.labels >= 0).sum()) for part in batch.micro_batches)
    return GlobalBatch(batch.micro_batches, valid, batch.samples)


def test_a_sequence_cut_over_ranks_is_refused() -> None:
    cfg = debug()
    cut = cfg.model_copy(update={"layout": cfg.layout.model_copy(update={"cp": 2})})  # past the rules of a config
    with pytest.raises(MeshError, match="layout: cp = 2: no attention here reads keys of another rank"):
        connected(cut, Place(0, 2), CPU)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "breadth_first"])
def test_micro_batches_give_the_gradients_of_one_large_batch(family: str, schedule: str) -> None:
    """Also with unequal numbers of valid tokens: the loss is the mean over all of them, not a mean of means."""
    results = []
    for micro in (1, 2, 4, 8):
        cfg = debug(f"batch.micro={micro}", f"model.family={family}", f"layout.schedule={schedule}", "optim.lr=1e-3")
        engine = Engine(cfg, CPU)
        batch = with_holes(next(made_up(debug("batch.micro=8"))))
        result = engine.step(recut(batch, micro), 1e-3)
        results.append((result, gradients(engine)))
    (first, expected), others = results[0], results[1:]
    for result, found in others:
        torch.testing.assert_close(result.loss, first.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(result.grad_norm, first.grad_norm, rtol=1e-5, atol=0)
        for name, grad in found.items():  # fp32 sums of 512 tokens in another order
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_first_loss_is_ln_v_and_equals_the_models_own() -> None:
    cfg = debug("batch.micro=8", "batch.global=8")
    engine, batch = Engine(cfg, CPU), next(made_up(cfg))
    part = batch.micro_batches[0]
    expected = engine.model.loss(part.tokens, part.labels).detach() / batch.valid_tokens
    loss = engine.step(batch, 1e-3).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(loss.item() - math.log(300)) < 0.1


def test_a_batch_without_any_valid_token_neither_divides_by_zero_nor_moves_weights_by_its_gradient() -> None:
    cfg = debug("optim.weight_decay=0")
    engine, batch = Engine(cfg, CPU), next(made_up(cfg))
    for part in batch.micro_batches:
        part.labels.fill_(-100)
    before = [group.param.clone() for group in engine.flat.groups]
    result = engine.step(GlobalBatch(batch.micro_batches, 0, batch.samples), 1e-3)
    assert result.loss.item() == 0 and result.grad_norm.item() == 0 and result.skipped.item() == 0
    assert all(torch.equal(a, group.param) for a, group in zip(before, engine.flat.groups, strict=True))


def test_overfits_one_batch() -> None:
    cfg = debug("batch.global=2", "optim.weight_decay=0")
    engine, batch = Engine(cfg, CPU), next(made_up(cfg))
    losses = [engine.step(batch, 3e-3).loss.item() for _ in range(80)]
    assert losses[-1] < 0.1 < 5 < losses[0]


def test_bf16_follows_fp32() -> None:
    """Same data, same schedule: the curves differ by bf16's rounding (2**-8 relative) and not by drift."""
    curves = []
    for dtype in ("fp32", "bf16"):
        cfg = debug(f"run.dtype={dtype}")
        engine, batches = Engine(cfg, CPU), made_up(cfg)
        assert engine.model.embed.weight.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        assert all(group.master.dtype == group.grad.dtype == torch.float32 for group in engine.flat.groups)
        curves.append([engine.step(next(batches), 3e-3).loss.item() for _ in range(40)])
    fp32, bf16 = curves
    assert fp32[-1] < fp32[0] - 0.5, "nothing was learned, so nothing was compared"
    assert max(abs(a - b) for a, b in zip(fp32, bf16, strict=True)) < 0.03


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where: str, dtype: str) -> None:
    cfg = debug(f"run.dtype={dtype}")
    engine, batches = Engine(cfg, CPU), made_up(cfg)
    engine.step(next(batches), 1e-3)
    buffers = [b for g in engine.flat.groups for b in (g.param, g.master)]
    buffers += engine.optimizer.exp_avg + engine.optimizer.exp_avg_sq
    before = [buffer.clone() for buffer in buffers]

    loss, hook = engine.stages[0].run, None
    if where == "loss":
        engine.stages[0].run = lambda *inputs: loss(*inputs) * torch.tensor(math.nan)
    else:
        weight = engine.model.norm.weight  # its gradient comes through autograd
        hook = weight.register_hook(lambda grad: torch.where(grad == grad.max(), math.inf, grad))
    result = engine.step(next(batches), 1e-3)
    assert result.skipped.item() == 1
    assert where == "loss" or (result.loss.isfinite() and result.grad_norm.isinf())
    assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True))

    engine.stages[0].run = loss
    if hook is not None:
        hook.remove()
    result = engine.step(next(batches), 1e-3)
    assert result.skipped.item() == 0 and engine.optimizer.updates.item() == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, buffers, strict=True))


def test_clipping_bounds_what_the_optimizer_sees() -> None:
    """With beta1 = 0 the first moment after one step is the clipped gradient itself."""
    cfg = debug("optim.clip=0.01", "optim.beta1=0")
    engine = Engine(cfg, CPU)
    norm = engine.step(next(made_up(cfg)), 1e-3).grad_norm
    assert norm > 0.1
    seen = torch.linalg.vector_norm(torch.cat(engine.optimizer.exp_avg))
    assert seen.item() == pytest.approx(0.01, rel=1e-4)


class CountWaits(TorchDispatchMode):
    """Counts the operations by which the host learns a value."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.waits += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(dtype: str) -> None:
    """The one value the host reads is the largest token of each micro-batch, which is on the host anyway."""
    cfg = debug(f"run.dtype={dtype}")
    engine, batch = Engine(cfg, CPU), next(made_up(cfg))
    with CountWaits() as mode:
        engine.step(batch, 1e-3)
    assert mode.waits == len(batch.micro_batches)


def test_a_token_outside_the_vocabulary_is_a_clear_error() -> None:
    cfg = debug()
    batch = next(made_up(cfg))
    batch.micro_batches[1].tokens[0, 5] = 300
    with pytest.raises(DataError, match=r"token 300.*0 \.\. 299"):
        Engine(cfg, CPU).step(batch, 1e-3)


@pytest.mark.slow
def test_compiled_model_takes_the_same_step() -> None:
    losses = []
    for compiled in ("false", "true"):
        cfg = debug(f"run.compile={compiled}", "model.layers=1", "batch.global=4")
        engine, batches = Engine(cfg, CPU), made_up(cfg)
        losses.append([engine.step(next(batches), 1e-3).loss.item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
