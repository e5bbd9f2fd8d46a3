"""The emulator itself: it computes what a GPU computes, and it catches what would be wrong on one."""

import shutil
from pathlib import Path

import emulated
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cases(loaded_emulator: emulated.Emulator, tmp_path_factory: pytest.TempPathFactory) -> emulated.Emulator:
    folder = tmp_path_factory.mktemp("cases")
    shutil.copytree(emulated.SOURCES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cu"))
    shutil.copy(HERE / "emulator_cases.cu", folder)
    return emulated.Emulator(emulated.build(folder, "megapre_cases"), "megapre_cases")


def run(cases: emulated.Emulator, which: str, x: Tensor, seeds: int = 1) -> list[Tensor]:
    """What a case makes of x under each of several schedules."""
    results = []
    for seed in range(seeds):
        cases.schedule(seed)
        results.append(cases.ops.run(x, which))
    return results


def test_barriers_are_kept_and_missed(cases: emulated.Emulator) -> None:
    for with_barrier, without, count in (
        ("reverse", "reverse, no barrier", 128),
        ("warp reverse", "warp, no barrier", 32),
    ):
        x = torch.arange(float(count))
        assert all(torch.equal(y, x.flip(0)) for y in run(cases, with_barrier, x, seeds=5))
        assert all(y.isnan().any() for y in run(cases, without, x, seeds=5)), "shared memory was poisoned"


def test_warps_agree(cases: emulated.Emulator) -> None:
    x = torch.arange(32.0) - 10
    (y,) = run(cases, "warp", x)
    assert y.tolist() == [x.sum().item(), 21.0, 21.0, *(x[2:-1].tolist())]


def test_clusters_read_each_other(cases: emulated.Emulator) -> None:
    x = torch.arange(8.0)
    assert all(y.tolist() == [6.0] * 4 + [22.0] * 4 for y in run(cases, "cluster", x, seeds=5))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_warps_multiply(cases: emulated.Emulator, dtype: str) -> None:
    x = torch.randint(-8, 9, (384,), generator=torch.Generator().manual_seed(0)).float()
    (y,) = run(cases, f"{dtype} product", x)
    assert torch.equal(y[:128].view(16, 8), x[:256].view(16, 16) @ x[256:].view(16, 8))


def test_copies_come_with_the_wait(cases: emulated.Emulator) -> None:
    x = torch.arange(128.0) + 1
    expected = x.view(32, 4).flip(0).clone()
    expected[0] = 0
    assert all(torch.equal(y.view(32, 4), expected) for y in run(cases, "copy async", x, seeds=3))
    assert all(y.isnan().all() for y in run(cases, "copy async, no wait", x, seeds=3))


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (
            "store past the end",
            r"illegal access: 0 bytes past the end of an allocation of 128 bytes in thread \(0, 0, 0\)",
        ),
        ("load past the end", "illegal access: 0 bytes past the end of an allocation of 128 bytes"),
        ("store before", "something was written in front of an allocation of 128 bytes"),
        ("misaligned", "undefined or misaligned operation"),
        ("past a shared array", "something was written past the end of a shared array"),
        ("past dynamic shared", "illegal access: 0 bytes past the end"),
        ("divergent", "threads wait for each other for ever: .* wait at __syncthreads.* wait at a warp operation"),
        ("no blocks", "invalid configuration argument"),
        ("too many threads", "invalid configuration argument"),
        ("too much shared", "invalid argument"),
        ("cluster, no finish", "the shared memory of block . of the cluster, which has ended"),
    ],
)
def test_what_is_wrong_is_said(cases: emulated.Emulator, which: str, said: str) -> None:
    x = torch.arange(64.0 if which == "divergent" else 32.0)
    with pytest.raises(RuntimeError, match=said):
        run(cases, which, x, seeds=20)
    assert torch.equal(run(cases, "reverse", torch.ones(128))[0], torch.ones(128)), "and the next launch runs"


def test_no_clusters_before_sm_90(cases: emulated.Emulator) -> None:
    cases.device(capability=80)
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        run(cases, "cluster", torch.arange(8.0))
    cases.device()


# Where, before, after; the width of the rows.
MUTATIONS = {
    "a barrier removed": ("reduce.h", "      __syncthreads();\n", "", 2056),
    "a wait of the cluster removed": ("reduce.h", "mbarrier_wait(&storage_.sent[buffer], sums_ >> 1 & 1);", "", 20000),
    "a bound removed": ("norm_forward.h", "at < width) {\n      normalised(", "true) {\n      normalised(", 2056),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_norm_is_caught(loaded_emulator: emulated.Emulator, tmp_path: Path, mutation: str) -> None:
    *change, width = MUTATIONS[mutation]
    mutated = emulated.mutated(tmp_path, "norm", *change)
    x, weight = mutated.guarded(torch.randn(3, width)), mutated.guarded(torch.ones(width))
    right = F.rms_norm(x, (width,), weight, 1e-5)

    def is_right() -> bool:
        return torch.allclose(mutated.ops.rms_norm(x, weight, 1e-5, None)[0], right)

    if mutation == "a barrier removed":
        assert not is_right()
    else:
        with pytest.raises(RuntimeError, match="illegal access" if "bound" in mutation else "cluster, which has ended"):
            is_right()
