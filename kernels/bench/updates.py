"""The optimizer and its norm."""

import torch
from torch import Tensor

from ..adamw import reference, stochastic_reference
from ..cost import cost
from .case import DTYPES, Case, Function, Sizes, Wrap, randn, take

SOME = 65536  # elements that are compared, and put back before each call


def adamw_(sizes: Sizes, dtype: str, device: str) -> Case:
    """A step of the optimizer on one flat shard; gradients of `grad_bytes` an element: 4 (fp32, the default) or 2."""
    sizes = take(sizes, "P", grad_bytes=4)
    count = sizes["P"]
    master, exp_avg = (randn((count,), "fp32", device) for _ in range(2))
    state = [master, exp_avg, exp_avg.square()]
    param = master if dtype == "fp32" else master.to(DTYPES[dtype])
    fresh = randn((count,), dtype if sizes["grad_bytes"] == 2 else "fp32", device)
    grad = fresh.clone()
    scalars = {
        "lr": torch.tensor(1e-6, device=device),  # many steps with one gradient: the weights must stay what they are
        "step": torch.tensor(10.0, device=device),
        "grad_scale": torch.tensor(0.5, device=device),
    }
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    start = [t[:SOME].clone() for t in (param, *state)]

    def adapt(function: Function) -> Function:
        def step() -> list[Tensor]:
            function(param, *state, grad, **scalars, **numbers)
            return [t[:SOME] for t in state]

        return step

    def exact() -> list[Tensor]:
        weights, exact_master, first, second, gradient = (t.double() for t in (*start, fresh[:SOME]))
        reference(weights, exact_master, first, second, gradient, **scalars, **numbers)  # type: ignore[arg-type]
        return [exact_master, first, second]

    def fused_fp32() -> list[Tensor]:
        torch._fused_adamw_(
            [master], [fp32_grad], [exp_avg], [state[2]], [], [scalars["step"]], lr=1e-6, beta1=0.9, beta2=0.95,
            weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False, grad_scale=two,
        )  # fmt: skip
        return [t[:SOME] for t in state]

    two, fp32_grad = torch.tensor(2.0, device=device), fresh.float()

    def prepare() -> None:
        grad.copy_(fresh)  # its content is unspecified after a call
        fp32_grad.copy_(fresh)
        for whole, part in zip((param, *state), start, strict=True):
            whole[:SOME] = part

    work = {"step": cost("adamw_", sizes, dtype)}
    return Case(
        "adamw_", sizes, dtype, device, "copy", work, adapt, peers={"fused_fp32": fused_fp32}, prepare=prepare,
        exact=exact,
    )  # fmt: skip


def adamw_stochastic_(sizes: Sizes, dtype: str, device: str) -> Case:
    """A step on a bf16 shard without a master, fp32 gradient; `dtype` is that of the moments, 16 bits meaning bf16."""
    sizes = take(sizes, "P")
    count, moments = sizes["P"], torch.float32 if dtype == "fp32" else torch.bfloat16
    exp_avg, grad = (randn((count,), "fp32", device) for _ in range(2))
    state = [randn((count,), "bf16", device), exp_avg.to(moments), exp_avg.square().to(moments)]
    scalars = {
        "lr": torch.tensor(1e-6, device=device),
        "step": torch.tensor(10.0, device=device),
        "grad_scale": torch.tensor(0.5, device=device),
    }
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "seed": 1, "offset": 0}
    start = [t[:SOME].clone() for t in state]

    def adapt(function: Function) -> Function:
        def step() -> list[Tensor]:
            function(*state, grad, **scalars, **numbers)
            return [t[:SOME] for t in state]

        return step

    def prepare() -> None:
        for whole, part in zip(state, start, strict=True):
            whole[:SOME] = part

    def exact() -> list[Tensor]:
        """As the op is defined: rounding draws the same bits whoever does it."""
        param, first, second = (t.clone() for t in start)
        stochastic_reference(param, first, second, grad[:SOME].clone(), **scalars, **numbers)  # type: ignore[arg-type]
        return [param, first, second]

    size = "fp32" if dtype == "fp32" else "bf16"
    work = {"step": cost("adamw_stochastic_", sizes, size)}
    return Case("adamw_stochastic_", sizes, dtype, device, "copy", work, adapt, prepare=prepare, exact=exact)


def grad_norm(sizes: Sizes, dtype: str, device: str) -> Case:
    sizes = take(sizes, "P")
    grads = [randn((part,), dtype, device) for part in (sizes["P"] // 2, sizes["P"] - sizes["P"] // 2)]

    def adapt(function: Function) -> Function:
        return lambda: [function(grads)]

    def plain(wrap: Wrap) -> Function:
        norm = wrap(lambda grads: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        return lambda: [norm(grads)]

    work = {"step": cost("grad_norm", sizes, dtype)}
    return Case(
        "grad_norm", sizes, dtype, device, "copy", work, adapt, plain,
        exact=lambda: [torch.stack([grad.double().norm() for grad in grads]).norm()],
    )  # fmt: skip
