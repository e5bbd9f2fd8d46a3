"""AdamW on flat shards: fp32 master weights and moments, a bf16 (or the same fp32) parameter, device-side scalars.

    g = grad * grad_scale
    master *= 1 - lr * weight_decay                                   decoupled (Loshchilov & Hutter 2019, alg. 2)
    m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
    master -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
    param = master rounded to its dtype

Shapes   all of param, master, exp_avg, exp_avg_sq, grad are 1-D of one length P; lr, step, grad_scale, found_inf 0-dim.
Cost     about 15 FLOPs an element; bytes an element: grad 4 (bf16: 2) read, master, m, v 12 read and 12 written, bf16
         parameter 2 written.
Floor    memory: bytes / copy rate.
Measured 55e6 parameters, fp32 gradient, bf16 parameter: native 18 to 28 ms from run to run of a virtual machine, 0.9 to
         1.9 times the rate of a copy (which fetches what it overwrites; here all but the parameter is read anyway);
         torch's fused kernel and a copy 23 to 40 ms. In runs of 18 to 19 ms:
         bf16 gradient 17.4 ms; adamw_stochastic_ 22.3 ms, with bf16 moments 46.8 ms, where random bits are the cost.
         AMD EPYC (Zen 4, AVX-512 bf16), two threads, torch 2.13, 2026-11-21.
         CUDA C++, Triton's adamw_ in its present form and its adamw_stochastic_: not yet run on a GPU.

lr, step, grad_scale (a multiplier: clip factor / loss scale) and found_inf are tensors on the device, so a step needs
no host sync. `step` is the number of this update, from 1; it is the caller's: where found_inf is not 0 nothing is
written, and the caller must not count the step.

`adamw_stochastic_` is the same update of a bf16 parameter that is its own master: 10 bytes of state and gradient an
element (6 with bf16 moments) in place of 18. Updates far below half of bf16's spacing would be lost in rounding to
nearest; rounded up or down at random, with probabilities by which the mean is exact, they add up (Gupta et al. 2015;
Zamirai et al. 2020, "Revisiting BFloat16 Training"). The random bits are those of philox.py for (seed, step, offset +
index): they depend on no thread and no history, so a run repeats and resumes bit for bit. Streams 0, 1, 2 round the
parameter, exp_avg and exp_avg_sq; fp32 moments draw nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import library
from .philox import bits16, round_stochastic
from .precision import wide


class Update(NamedTuple):
    """What every implementation takes by keyword: TypeError where one is missing or unknown."""

    lr: Tensor
    step: Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def arguments(self) -> list[Any]:
        """In the order of the registered ops."""
        return [getattr(self, name) for name in ARGUMENTS]


UPDATE = (
    "Tensor lr, Tensor step, Tensor? grad_scale, Tensor? found_inf, "
    "float beta1, float beta2, float eps, float weight_decay"
)
"""The part of `Update` in the schemas of the registered ops."""
ARGUMENTS = tuple(argument.split()[-1] for argument in UPDATE.split(","))


def _check_lengths(op: str, **tensors: Tensor) -> None:
    if len({t.shape for t in tensors.values()}) != 1 or next(iter(tensors.values())).dim() != 1:
        raise ValueError(
            f"{op}: {', '.join(tensors)} must be flat and of one length; they are "
            f"{[tuple(t.shape) for t in tensors.values()]}"
        )


def _check(param: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> None:
    _check_lengths("adamw_", param=param, master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=grad)
    dtypes = [t.dtype for t in (master, exp_avg, exp_avg_sq)]
    if len(set(dtypes)) != 1:
        raise ValueError(f"adamw_: master and moments must share a dtype; they are {dtypes}")


def _check_stochastic(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, offset: int) -> None:
    _check_lengths("adamw_stochastic_", param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=grad)
    moments = {exp_avg.dtype, exp_avg_sq.dtype}
    if param.dtype != torch.bfloat16 or moments not in ({torch.float32}, {torch.bfloat16}):
        raise ValueError(
            f"adamw_stochastic_: param must be bf16 and both moments fp32, or both bf16; they are {param.dtype}, "
            f"{exp_avg.dtype} and {exp_avg_sq.dtype}"
        )
    if offset < 0:
        raise ValueError(f"adamw_stochastic_: offset = {offset}; it must not be negative")


def _updated(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, told: Update
) -> tuple[Tensor, Tensor, Tensor]:
    """The next master and moments in the precision of the computation, fp32 or fp64."""
    dtype = wide(master.dtype)
    g = grad.to(dtype)
    if told.grad_scale is not None:
        g = g * told.grad_scale
    lr, step = told.lr.to(dtype), told.step.to(torch.float64)
    correction1 = (1.0 - told.beta1**step).to(dtype)
    correction2 = (1.0 - told.beta2**step).to(dtype)
    new_avg = told.beta1 * exp_avg.to(dtype) + (1.0 - told.beta1) * g
    new_sq = told.beta2 * exp_avg_sq.to(dtype) + (1.0 - told.beta2) * g * g
    denominator = (new_sq / correction2).sqrt() + told.eps
    return master.to(dtype) * (1.0 - lr * told.weight_decay) - lr / correction1 * new_avg / denominator, new_avg, new_sq


def _unless(found_inf: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return new if found_inf is None else torch.where(found_inf != 0, old, new)


@torch.no_grad()
def reference(
    param: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    **update: Any,
) -> None:
    """Plain torch, the definition of correct. Updates param, master and the moments in place; no host sync.

    `param` may be the same tensor as `master`. ValueError when shapes or dtypes of the state differ. After the call
    the content of `grad` is unspecified (some implementations scale it in place).
    """
    _check(param, master, exp_avg, exp_avg_sq, grad)
    told = Update(**update)
    new = _updated(master, exp_avg, exp_avg_sq, grad, told)
    for old, value in zip((master, exp_avg, exp_avg_sq), new, strict=True):
        old.copy_(_unless(told.found_inf, old, value))
    if param is not master:
        param.copy_(_unless(told.found_inf, param.to(master.dtype), master))


@torch.no_grad()
def fused_torch(
    param: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    **update: Any,
) -> None:
    """Through torch's fused kernel, one pass over the state, then the copy into `param`. As `reference`.

    torch divides by its grad_scale, so it gets the reciprocal, and it writes the scaled gradient back into `grad`.
    """
    _check(param, master, exp_avg, exp_avg_sq, grad)
    told = Update(**update)
    torch._fused_adamw_(
        [master], [grad.to(master.dtype)], [exp_avg], [exp_avg_sq], [], [told.step], lr=told.lr, beta1=told.beta1,
        beta2=told.beta2, weight_decay=told.weight_decay, eps=told.eps, amsgrad=False, maximize=False,
        grad_scale=None if told.grad_scale is None else told.grad_scale.reciprocal(), found_inf=told.found_inf,
    )  # fmt: skip
    if param is not master:
        param.copy_(master)


@torch.no_grad()
def native(
    param: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    **update: Any,
) -> None:
    """Through `megapre::adamw_`: state and parameter in one pass; `grad` is only read. As `reference`."""
    _check(param, master, exp_avg, exp_avg_sq, grad)
    separate = None if param is master else param  # a schema must not name one tensor twice among what it writes
    torch.ops.megapre.adamw_(separate, master, exp_avg, exp_avg_sq, grad, *Update(**update).arguments())


@torch.no_grad()
def stochastic_reference(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    seed: int,
    offset: int = 0,
    **update: Any,
) -> None:
    """Plain torch, the definition of `adamw_stochastic_`. Updates bf16 param and moments in place; no host sync.

    `offset` is the number of element 0 among all that share `seed`: shards and groups take bits of their own by it.
    Moments are fp32, or bf16 and then rounded like the parameter. ValueError for other dtypes, or lengths that differ.
    """
    _check_stochastic(param, exp_avg, exp_avg_sq, grad, offset)
    state, told = (param, exp_avg, exp_avg_sq), Update(**update)
    new = _updated(*state, grad, told)
    for stream, (old, value) in enumerate(zip(state, new, strict=True)):
        if old.dtype == torch.bfloat16:
            value = round_stochastic(value, bits16(seed, told.step, stream, offset, value.numel()))
        old.copy_(_unless(told.found_inf, old, value))


@torch.no_grad()
def stochastic_native(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    seed: int,
    offset: int = 0,
    **update: Any,
) -> None:
    """Through `megapre::adamw_stochastic_`, one pass. As `stochastic_reference`, with the same random bits."""
    _check_stochastic(param, exp_avg, exp_avg_sq, grad, offset)
    told = Update(**update).arguments()
    torch.ops.megapre.adamw_stochastic_(param, exp_avg, exp_avg_sq, grad, *told, seed, offset)


# The registered ops: kernels in plain torch, fake tensors.


def _kernel(
    param: Tensor | None, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *told: Any
) -> None:
    update = dict(zip(ARGUMENTS, told, strict=True))
    reference(master if param is None else param, master, exp_avg, exp_avg_sq, grad, **update)


def _stochastic_kernel(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *rest: Any) -> None:
    *told, seed, offset = rest
    update = dict(zip(ARGUMENTS, told, strict=True))
    stochastic_reference(param, exp_avg, exp_avg_sq, grad, seed=seed, offset=offset, **update)


def register(ops: torch.library.Library) -> None:
    """Registers `megapre::adamw_` and `megapre::adamw_stochastic_`."""
    library.add(
        ops,
        "adamw_(Tensor(a!)? param, Tensor(b!) master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor grad, "
        f"{UPDATE}) -> ()",
        _kernel,
        lambda *_: None,
    )
    library.add(
        ops,
        "adamw_stochastic_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, "
        f"{UPDATE}, int seed, int offset) -> ()",
        _stochastic_kernel,
        lambda *_: None,
    )
