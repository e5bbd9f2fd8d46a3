"""A recorded step reads everything that changes from memory: on the CPU, with a recorder of our own."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megapre import kernels
from megapre.config import Config, ConfigError, load
from megapre.data import GlobalBatch, MicroBatch
from megapre.train import stage
from megapre.train.bench import made_up
from megapre.train.fixed import FixedInputs, filled
from megapre.train.graph import WARMUP, GraphError, Recorded
from megapre.train.step import Engine, StepResult

CPU = torch.device("cpu")


def debug(*overrides: str) -> Config:
    return load("debug", ["model.vocab=300", *overrides])


class Tape(TorchDispatchMode):
    """Records operations with their arguments as they are, and plays them again into the same memory.

    As a CUDA graph: no Python of the step runs in a replay, numbers that were passed by value stay what they were, and
    tensors stay where they were. Unlike a graph it runs what it records.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    if old.untyped_storage().data_ptr() not in inputs:  # else it is a view, or was written in place
                        old.copy_(new)
                else:
                    assert old == new, f"{func} told the host {old}, and {new} when replayed"


def record_on_tape(engine: Engine, state: Callable[[], list[Tensor]]) -> Callable[[Any], Any]:
    def record(work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        before = [tensor.clone() for tensor in state()]
        tape = Tape()
        with tape:
            results = work()
        with torch.no_grad():  # recording runs nothing
            for tensor, old in zip(state(), before, strict=True):
                tensor.copy_(old)

        def replay() -> None:
            with torch.no_grad():
                tape.play()

        return replay, results

    return record


def state_of(engine: Engine) -> list[Tensor]:
    flat = [buffer for group in engine.flat.groups for buffer in (group.param, group.master, group.grad)]
    optimizer = [*engine.optimizer.exp_avg, *engine.optimizer.exp_avg_sq, engine.optimizer.updates]
    scale = [] if engine.loss_scale is None else [engine.loss_scale.scale, engine.loss_scale.good_steps]
    return [*flat, *optimizer, *scale, engine.feed.total]


def recorded(cfg: Config) -> Engine:
    engine = Engine(cfg, CPU)
    engine.feed.fixed = FixedInputs(CPU, in_place=True)
    engine.recorded = Recorded(engine._on_device, record_on_tape(engine, lambda: state_of(engine)))
    return engine


def with_documents(batch: GlobalBatch, counts: list[int]) -> GlobalBatch:
    """The same tokens in `counts` documents a micro-batch, without a loss in the first of them."""
    parts = []
    for part, count in zip(batch.micro_batches, counts, strict=True):
        rows, length = part.tokens.shape
        cuts = sorted({*range(0, rows * length + 1, length), *(7 * at % (rows * length) for at in range(count))})
        ends = torch.tensor(cuts, dtype=torch.int32)
        labels = part.labels.clone()
        labels[0, : cuts[1]] = -100
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)]).view(rows, length)
        parts.append(MicroBatch(part.tokens, labels, positions, ends))
    valid = sum(int((part.labels >= 0).sum()) for part in parts)
    return GlobalBatch(tuple(parts), valid, batch.samples)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_replayed_steps_are_the_steps_themselves(family: str, dtype: str) -> None:
    """Bit for bit, with another learning rate, other tokens and another number of valid ones in each."""
    cfg = debug(f"model.family={family}", f"run.dtype={dtype}", "optim.clip=0.1", "optim.loss_scale_window=2")
    plain, replayed = Engine(cfg, CPU), recorded(cfg)
    batches = made_up(cfg)
    for step in range(WARMUP + 5):
        batch = next(batches)
        for part in batch.micro_batches:
            part.labels[:, : 5 * step] = -100
        batch = GlobalBatch(batch.micro_batches, sum(int((p.labels >= 0).sum()) for p in batch.micro_batches), 8)
        lr = 1e-3 * (step + 1)
        expected, got = (engine.step(batch, lr, stop=step == WARMUP + 2) for engine in (plain, replayed))
        assert [v.item() for v in got if v is not None] == [v.item() for v in expected if v is not None], step
    assert all(torch.equal(a, b) for a, b in zip(state_of(plain), state_of(replayed), strict=True))
    assert replayed.optimizer.updates.item() == WARMUP + 5


def test_a_replayed_step_can_be_skipped_and_scale_falls() -> None:
    cfg = debug("run.dtype=fp16")
    plain, replayed = Engine(cfg, CPU), recorded(cfg)
    batches, skipped = made_up(cfg), []
    for step in range(WARMUP + 4):
        batch = next(batches)
        if step == WARMUP + 1:
            for engine in (plain, replayed):
                engine.loss_scale.scale.fill_(2.0**24)  # beyond fp16: the gradients overflow
        results = [engine.step(batch, 1e-3) for engine in (plain, replayed)]
        assert results[0].loss_scale.item() == results[1].loss_scale.item()
        assert results[0].skipped.item() == results[1].skipped.item()
        skipped.append(results[1].skipped.item())
    assert skipped[: WARMUP + 2] == [0.0] * (WARMUP + 1) + [1.0]
    assert replayed.loss_scale.scale.item() == 2.0 ** (24 - sum(skipped))
    assert all(torch.equal(a, b) for a, b in zip(state_of(plain), state_of(replayed), strict=True))


def test_results_of_a_replay_are_not_overwritten_by_the_next() -> None:
    cfg = debug()
    engine, batches = recorded(cfg), made_up(cfg)
    results = [engine.step(next(batches), 1e-2) for _ in range(WARMUP + 3)]
    assert len({result.loss.item() for result in results}) == WARMUP + 3


def test_documents_of_any_number_share_a_recording_until_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = debug("kernels.attention=reference", "kernels.rope_=reference")
    plain, replayed = Engine(cfg, CPU), recorded(cfg)
    # What these read of cu_seqlens and positions on the CPU, to check them, a device does not read.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    batches, parts = made_up(cfg), cfg.batch.global_ // cfg.batch.micro
    counts = [
        [3] * parts,
        [9, 1, *[2] * (parts - 2)],
        [5] * parts,
        *[[at + 1] * parts for at in range(6)],
        [40] * parts,
    ]
    for step, count in enumerate(counts):
        batch = with_documents(next(batches), count)
        expected, got = plain.step(batch, 1e-3), replayed.step(batch, 1e-3)
        assert got.loss.item() == expected.loss.item(), step
    assert len(replayed.recorded.recordings) == 1 and len(replayed.recorded.calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(state_of(plain), state_of(replayed), strict=True))


def test_numbers_of_documents_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = debug("model.layers=1", "batch.global=2", "batch.micro=1", "run.compile=true")
    engine, batches, compiled = Engine(cfg, CPU), made_up(cfg), CompileCounter()
    torch.compiler.reset()
    engine.stages[0].run = torch.compile(engine.model.run, dynamic=False, backend=compiled)
    frames = []
    for counts in ([1, 2], [5, 3], [9, 14], [4, 4], [20, 1]):
        engine.step(with_documents(next(batches), counts), 1e-3)
        frames.append(compiled.frame_count)
    assert frames[0] == frames[3] < frames[4], "up to 16 documents are one shape, 20 are another"


@pytest.mark.parametrize(("count", "bounds"), [(1, 17), (16, 17), (17, 33), (33, 65)])
def test_bounds_are_filled_up_with_documents_of_no_length(count: int, bounds: int) -> None:
    ends = torch.cat((torch.arange(count), torch.tensor([50]))).to(torch.int32)
    part = MicroBatch(torch.zeros(1, 50), torch.zeros(1, 50), None, ends)
    fixed = FixedInputs(CPU, in_place=True)
    (found,) = fixed.take([part])
    assert len(found.cu_seqlens) == bounds and found.cu_seqlens.diff().count_nonzero() == count
    assert found.positions is None and torch.equal(found.cu_seqlens[: count + 1], ends)
    (again,) = fixed.take([MicroBatch(part.tokens + 1, part.labels, None, torch.tensor([0, 50], dtype=torch.int32))])
    assert again.tokens.data_ptr() == found.tokens.data_ptr() and again.tokens.max() == 1
    assert len(again.cu_seqlens) == bounds, "the length never falls"
    assert filled(None, 5) is None


def test_a_graph_is_refused_where_there_can_be_none() -> None:
    with pytest.raises(GraphError, match="needs a CUDA device, this run is on the cpu"):
        Engine(debug("run.cuda_graph=true"), CPU)
    with pytest.raises(ConfigError, match=r"one rank, but layout has tp\*pp\*cp\*dp = 2; nearest: cuda_graph false"):
        debug("run.cuda_graph=true", "layout.tp=2")
    with pytest.raises(ConfigError, match="cuda_graph needs a CUDA device, but device = 'cpu'"):
        debug("run.cuda_graph=true", "run.device=cpu")


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device without values, served by what serves CUDA: to learn one, or to copy one to the host, is an error."""
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *arguments, **settings: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setitem(kernels.linear_cross_entropy.MAX_LOGITS, "meta", 2**20)

    choose_on = kernels.choose

    def choose(device: str, overrides: dict[str, str], dtype: torch.dtype) -> kernels.Kernels:
        return choose_on("cuda", {"attention": "triton", **overrides}, dtype)

    monkeypatch.setattr(stage.kernels, "choose", choose)
    return torch.device("meta")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_step_over_the_rows_of_a_gpu_asks_the_device_for_nothing(
    on_meta: torch.device, family: str, dtype: str, documents: bool
) -> None:
    cfg = debug(f"run.dtype={dtype}", f"model.family={family}", "optim.grad_dtype=fp32")
    engine, batch = Engine(cfg, on_meta), next(made_up(cfg))
    assert engine.ops.names["attention"] == engine.ops.names["adamw_"] == "triton"
    if documents:
        batch = with_documents(batch, [3] * len(batch.micro_batches))
    result = engine.step(batch, 1e-3)
    assert result.loss.device == on_meta
    with pytest.raises((NotImplementedError, RuntimeError)):
        result.loss.item()  # as every such question in the step would have
