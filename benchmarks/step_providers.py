"""The training step of megapre and of its peers, each a call on a line of tokens, from the same initial weights.

Everything that can be the same is: weights, tokens, labels, betas, decay on matrices alone, clipping, the settings of
threads and memory. Imported in the worker alone.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plain_model import PlainModel

from megapre import kernels, plan
from megapre.config import Config
from megapre.data import GlobalBatch, MicroBatch
from megapre.interop.huggingface import to_hf
from megapre.model.init import initialize
from megapre.model.state import export_state, load_state
from megapre.model.transformer import Transformer
from megapre.train import machine
from megapre.train.step import Engine

Task = dict[str, Any]
LR = 3e-4
BF16_ALONE = {"master": "none", "moments": "bf16", "grad_dtype": "bf16"}
HF_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


class Step(NamedTuple):
    """A provider's training step. `before` is the memory that the process held before its model was built, in bytes."""

    before: int
    parameters: int
    call: Callable[[torch.Tensor], torch.Tensor]
    """Trains on tokens [B, S + 1] and returns their loss, 0-dim, on the device."""


def config(task: Task) -> Config:
    return Config.model_validate(
        {
            "name": task["case"],
            "model": {**task["shape"], "context": task["length"], "tied": True},
            "batch": {"micro": task["sequences"], "global": task["sequences"], "seq_length": task["length"]},
            "optim": {
                **{"lr": LR, "clip": 1.0, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
                **(BF16_ALONE if task["provider"].startswith("megapre-bf16") else {}),
            },
            "layout": {"recompute": ["norm", "activation"] if task["provider"].endswith("-recompute") else []},
            "run": {
                "steps": 1000,
                "dtype": "bf16",
                "device": task["device"],
                "compile": task["provider"] == "megapre-compile",
                "cuda_graph": task["provider"] == "megapre-graph",
            },
        }
    )


def save_weights(task: Task, path: Path) -> None:
    """The initial weights of `task`'s shape, in bf16, under megapre's names."""
    model = Transformer(config(task).model, kernels.choose("cpu"), dtype=torch.bfloat16)
    initialize(model, 1)
    torch.save({name: value.clone() for name, value in export_state(model).items()}, path)


def build(task: Task) -> Step:
    """The step of `task["provider"]`, with the weights of the file `task["weights"]`."""
    builders = {"megapre": of_megapre, "hf": of_hugging_face, "plain": of_plain_model}
    return builders[task["provider"].partition("-")[0]](task)


def weights(task: Task) -> dict[str, torch.Tensor]:
    return torch.load(task["weights"], mmap=True)  # pages of the file, which count only while they are read


def prepare(cfg: Config, compiler: bool = False) -> tuple[torch.device, int]:
    """The device, and the memory in use before a model is built; with `compiler` what torch.compile loads is in it."""
    device = machine.prepare(cfg.run)
    if compiler:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    reset_peak(device)
    return device, machine.peak_memory(device)


def reset_peak(device: torch.device) -> None:
    """Makes the peak memory that which is in use now. On a CPU, Linux alone can do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform.startswith("linux"):
        Path("/proc/self/clear_refs").write_text("5")


def of_megapre(task: Task, ops: Callable[[kernels.Kernels], kernels.Kernels] | None = None) -> Step:
    """`ops` wraps the chosen kernels, for a profile."""
    cfg = config(task)
    device, before = prepare(cfg, "compile" in task["provider"])
    choose = kernels.choose
    if ops is not None:
        kernels.choose = lambda *args: ops(choose(*args))
    try:
        engine = Engine(cfg, device)
    finally:
        kernels.choose = choose
    load_state(engine.model, weights(task))
    for group in engine.flat.groups:
        group.master.copy_(group.param)

    def step(line: torch.Tensor) -> torch.Tensor:
        part = MicroBatch(line[:, :-1].contiguous(), line[:, 1:].contiguous(), None, None)
        return engine.step(GlobalBatch((part,), part.labels.numel(), cfg.batch.global_), LR).loss

    return Step(before, sum(plan.count(cfg.model)), step)


def of_hugging_face(task: Task) -> Step:
    import transformers

    cfg = config(task)
    getattr(transformers, HF_CLASSES[cfg.model.family])  # imported now, so that its code does not count as its memory
    device, before = prepare(cfg, "compile" in task["provider"])
    settings, state = to_hf(cfg.model, weights(task))
    settings = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict({**settings, "use_cache": False})
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    model.load_state_dict(state, strict=False)  # lacks lm_head.weight, which is tied
    del state
    if "liger" in task["provider"].split("-"):
        return peer(task, model, through_liger(model), device, before)

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # The model's own loss, told that labels are those of the next tokens already.
        logits = model(input_ids=tokens).logits
        return model.loss_function(logits, labels, vocab_size=cfg.model.vocab, shift_labels=labels)

    return peer(task, model, loss, device, before)


def through_liger(model: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss with what Liger has for the model's type (of GPT-2: none), and its linear layer with cross-entropy.

    Its own forward of a model shifts labels, which here are those of the next tokens already.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    fused = LigerFusedLinearCrossEntropyLoss()

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=tokens)[0]
        return fused(model.get_output_embeddings().weight, hidden.flatten(0, 1), labels.flatten())  # type: ignore[no-any-return]

    return loss


def of_plain_model(task: Task) -> Step:
    cfg = config(task)
    device, before = prepare(cfg, "compile" in task["provider"])
    model = PlainModel(task["shape"], task["length"])
    model.load(weights(task))
    return peer(task, model, model, device, before)


def peer(
    task: Task, model: torch.nn.Module, loss: Callable[..., torch.Tensor], device: torch.device, before: int
) -> Step:
    """The loop as users write it: fused AdamW, clip_grad_norm_, autocast or bf16 weights, torch.compile or not."""
    words = task["provider"].split("-")
    autocast = "autocast" in words
    model = model.to(device, torch.float32 if autocast else torch.bfloat16).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(loss, dynamic=False) if "compile" in words else loss

    def step(line: torch.Tensor) -> torch.Tensor:
        line = line.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            value = forward(line[:, :-1].contiguous(), line[:, 1:].contiguous())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.detach()

    return Step(before, sum(p.numel() for p in model.parameters()), step)


def named(ops: kernels.Kernels) -> kernels.Kernels:
    """`ops` whose calls a profiler sees by the name of the op, as in "op:rope", whatever they are made of."""

    def wrap(name: str) -> Callable[..., Any]:
        function = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(f"op:{name}"):
                return function(*args, **kwargs)

        return call

    return dataclasses.replace(ops, **{name: wrap(name) for name in ops.names})
