"""What the products of a training step cost by themselves: no step that computes them can take less time.

The products of linear layers and of the head, three for each (forward, input gradient, weight gradient), are timed one
by one, as torch.mm computes them and as megapre's own op does; the shortest time of each counts, once for every layer
that has it. Attention's own products (causal: half of the square) are too small to be timed alone: they are taken at
the largest rate that any of the others reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from step_providers import config, prepare

from megapre import kernels, plan
from megapre.model.transformer import Transformer
from megapre.plan.flops import by_part
from megapre.train import machine

CALLS = {"cpu": 1, "cuda": 10}  # in a row, timed as one
ROUNDS = 5


def flops(task: dict[str, Any]) -> dict[str, Any]:
    """FLOPs of a token's products (causal attention counted as half), and the device's peak rate if it is known."""
    cfg = config(task)
    known = plan.find(machine.describe(torch.device(task["device"])))
    return {
        "flops_per_token": plan.per_token(cfg.model, task["length"]),
        "peak_flops": known.peak("bf16") if known else None,
    }


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Of each product, FLOPs, how many a step has, and its least seconds by torch and by megapre.

    {"products": {name: {"flops", "count"}}, "times": {name: [torch, megapre]}, "scores_flops": attention's own}.
    """
    cfg = config(task)
    device, _ = prepare(cfg)
    rows = task["sequences"] * task["length"]
    products, times = {}, {}
    with torch.no_grad():
        for (outs, ins), count in layers(cfg.model).items():
            for direction, *seconds in directions(rows, outs, ins, device):
                name = f"{outs} x {ins}, {direction}"
                products[name] = {"flops": 2 * rows * outs * ins, "count": count}
                times[name] = seconds
    scores = by_part(cfg.model, task["length"])["scores"] * rows
    return {"products": products, "times": times, "scores_flops": scores}


def layers(model: Any) -> Counter[tuple[int, int]]:
    """(O, I) of each linear layer and of the head, and how many of it there are."""
    whole = Transformer(model, kernels.choose("cpu"), device="meta")
    shapes = [tuple(m.weight.shape) for m in whole.modules() if isinstance(m, torch.nn.Linear) and m is not whole.head]
    return Counter([*shapes, tuple(whole.head_weight.shape)])


def directions(rows: int, outs: int, ins: int, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(name, seconds by torch, seconds by megapre) of the three products; megapre's weight gradient is fp32."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, weight, dy = some(rows, ins), some(outs, ins), some(rows, outs)
    y, dx, dweight = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
    total, ops = torch.empty_like(weight, dtype=torch.float32), torch.ops.megapre
    for name, *calls in (
        ("forward", lambda: torch.mm(x, weight.T, out=y), lambda: ops.linear_(y, x, weight, None)),
        ("input gradient", lambda: torch.mm(dy, weight, out=dx), lambda: ops.linear_input_gradient_(dx, dy, weight)),
        (
            "weight gradient",
            lambda: torch.mm(dy.T, x, out=dweight),
            lambda: ops.linear_weight_gradient_(total, None, dy, x, False),
        ),
    ):
        best = [float("inf"), float("inf")]
        for _ in range(ROUNDS):
            best = [min(least, timed(call, device)) for least, call in zip(best, calls, strict=True)]
        yield name, best[0], best[1]


def timed(call: Callable[[], Any], device: torch.device) -> float:
    begin = machine.now(device)
    for _ in range(CALLS[device.type]):
        call()
    return machine.seconds(begin, machine.now(device)) / CALLS[device.type]
