"""CUDA attention for sm_90a under emulation: mistakes put into its kernel are caught."""

import shutil
from pathlib import Path

import emulated
import pytest
import torch
from attended import drawn
from torch import Tensor
from torch.nn import functional as F

# What to break, in which file, and what is said if anything is; else the result is wrong.
MUTATIONS = {
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


def built(folder: Path, mutation: str) -> emulated.Emulator:
    """The forward kernel alone, mutated or as it is."""
    shutil.copytree(emulated.SOURCES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cu"))
    shutil.copy(emulated.SOURCES / "attention_sm90_forward.cu", folder)
    shutil.copy(Path(__file__).with_name("sm90_forward_case.cu"), folder)
    if mutation:
        name, before, after, _ = MUTATIONS[mutation]
        source = (folder / name).read_text()
        assert source.count(before) == 1, f"{name} has changed: what is the line to break now?"
        (folder / name).write_text(source.replace(before, after))
    namespace = f"megapre_{mutation.replace(' ', '_') or 'unbroken'}"
    return emulated.Emulator(emulated.build(folder, namespace), namespace)


@pytest.mark.parametrize("mutation", ["", *MUTATIONS])
def test_a_mutated_kernel_is_caught(loaded_emulator: emulated.Emulator, tmp_path: Path, mutation: str) -> None:
    kernel = built(tmp_path, mutation)
    q, k, v = (kernel.guarded(drawn(1, 600, 1, 64, dtype=torch.bfloat16, seed=i)) for i in range(3))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2).float() for t in (q, k, v)), is_causal=True)

    def is_right(seed: int) -> bool:
        kernel.schedule(seed)
        o: Tensor = kernel.ops.attend(q, k, v, 64**-0.5)
        return torch.allclose(o.float(), expected.transpose(1, 2), atol=2e-2)

    if not mutation:
        assert all(is_right(seed) for seed in range(6))
    elif said := MUTATIONS[mutation][3]:
        with pytest.raises(RuntimeError, match=said):
            is_right(0)
    else:
        assert not all(is_right(seed) for seed in range(6))
