"""CUDA attention for sm_90a under emulation: mistakes put into its kernels are caught."""

import shutil
from collections.abc import Callable
from pathlib import Path

import emulated
import pytest
import torch
from attended import drawn
from torch import Tensor
from torch.nn import functional as F

# What to break, in which file, and what is said if anything is; else the result is wrong.
Mutations = dict[str, tuple[str, str, str, str]]
FORWARD: Mutations = {
    "a stage is filled before it is free": (
        "attention_sm90_forward.cu",
        "        stages.wait_empty(i);\n",
        "",
        "more arrivals at an mbarrier than a phase has",
    ),
    "values are read before they are there": (
        "attention_sm90_forward.cu",
        "      barriers.values.wait_full(i);\n",
        "",
        "",
    ),
    "a stage waits for the other phase": (
        "attention_sm90.h",
        "(i / STAGES & 1) ^ 1",
        "i / STAGES & 1",
        "threads wait for each other for ever: .* wait at an mbarrier",
    ),
    "the result is stored unswizzled": ("attention_sm90.h", "(chunk ^ at % 8) * 16", "chunk * 16", ""),
}
BACKWARD: Mutations = {
    "P is read before it is there": (
        "attention_sm90_key_gradients.h",
        "          barrier_wait(kIsPassed, 2 * kWarpgroup);\n",
        "",
        "",
    ),
    "P is written before the last one was taken": (
        "attention_sm90_key_gradients.h",
        "            barrier_wait(kIsTaken, 2 * kWarpgroup);\n",
        "",
        "threads wait for each other for ever: .* wait at a named barrier",
    ),
    "keys are given back while a product reads them": (
        "attention_sm90_query_gradient.h",
        "        warpgroup_wait<1>();\n        barriers.keys.release(i - 1);\n",
        "        barriers.keys.release(i - 1);\n",
        "",
    ),
    "values are not given back": (
        "attention_sm90_query_gradient.h",
        "      barriers.values.release(i);\n",
        "",
        "threads wait for each other for ever: .* wait at an mbarrier",
    ),
    "scores are read before they are there": (
        "attention_sm90_query_gradient.h",
        "      warpgroup_wait<1>();\n      settle(p);\n",
        "",
        "sums of a product were written between its start and the wait for it",
    ),
}


def built(folder: Path, unit: str, mutation: str, mutations: Mutations) -> emulated.Emulator:
    """The kernels of `unit` alone, mutated or as they are; those that are not built are never called."""
    shutil.copytree(emulated.SOURCES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cu"))
    shutil.copy(emulated.SOURCES / unit, folder)
    shutil.copy(Path(__file__).with_name("sm90_case.cu"), folder)
    if mutation:
        name, before, after, _ = mutations[mutation]
        source = (folder / name).read_text()
        assert source.count(before) == 1, f"{name} has changed: what is the line to break now?"
        (folder / name).write_text(source.replace(before, after))
    namespace = f"megapre_{Path(unit).stem}_{mutation.replace(' ', '_') or 'unbroken'}"
    return emulated.Emulator(emulated.build(folder, namespace), namespace)


def caught(kernel: emulated.Emulator, is_right: Callable[[], bool], mutation: str, said: str) -> None:
    """Right under every schedule; or where mutated, an error that says so, or wrong under some schedule."""

    def is_right_with(seed: int) -> bool:
        kernel.schedule(seed)
        return is_right()

    if not mutation:
        assert all(is_right_with(seed) for seed in range(6))
    elif said:
        with pytest.raises(RuntimeError, match=said):
            is_right_with(0)
    else:
        assert not all(is_right_with(seed) for seed in range(6))


@pytest.mark.parametrize("mutation", ["", *FORWARD])
def test_a_mutated_forward_is_caught(loaded_emulator: emulated.Emulator, tmp_path: Path, mutation: str) -> None:
    kernel = built(tmp_path, "attention_sm90_forward.cu", mutation, FORWARD)
    q, k, v = (kernel.guarded(drawn(1, 600, 1, 64, dtype=torch.bfloat16, seed=i)) for i in range(3))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2).float() for t in (q, k, v)), is_causal=True)

    def is_right() -> bool:
        o: Tensor = kernel.ops.attend(q, k, v, 64**-0.5)
        return torch.allclose(o.float(), expected.transpose(1, 2), atol=2e-2)

    caught(kernel, is_right, mutation, FORWARD[mutation][3] if mutation else "")


@pytest.mark.parametrize("mutation", ["", *BACKWARD])
def test_a_mutated_backward_is_caught(loaded_emulator: emulated.Emulator, tmp_path: Path, mutation: str) -> None:
    """With head dim 136, where P passes between warpgroups and one stage of values goes around."""
    kernel = built(tmp_path, "attention_sm90_backward.cu", mutation, BACKWARD)
    length, scale = 300, 0.2
    q, k, v, do = (kernel.guarded(drawn(1, length, 1, 136, dtype=torch.bfloat16, seed=i)) for i in range(4))
    leaves = [t.float().requires_grad_() for t in (q, k, v)]
    scores = torch.einsum("bind,bjnd->bnij", leaves[0], leaves[1]) * scale
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    o = torch.einsum("bnij,bjnd->bind", scores.softmax(-1), leaves[2])
    expected = torch.autograd.grad(o, leaves, do.float())
    statistics = torch.zeros(1, 1, 384, 2)
    statistics[..., 0] = torch.inf
    statistics[:, :, :length, 0] = scores.detach().logsumexp(-1) / torch.tensor(2.0).log()
    statistics[:, :, :length, 1] = (o * do).sum(-1).detach().transpose(1, 2)

    def is_right() -> bool:
        got: list[Tensor] = kernel.ops.gradients(q, k, v, do, statistics, scale)
        return all(torch.allclose(g.float(), e, atol=3e-2, rtol=3e-2) for g, e in zip(got, expected, strict=True))

    caught(kernel, is_right, mutation, BACKWARD[mutation][3] if mutation else "")
