"""The CUDA cross_entropy under emulation, beyond tests/forms: wide rows, labels outside, any order of warps."""

from pathlib import Path

import emulated
import pytest
import torch
from rule import same
from scored import IGNORE, all_ways, drawn, in_place, in_shards, in_two, obeys


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.bfloat16, 32773), (torch.bfloat16, 70001), (torch.float32, 66000)])
def test_wide_rows_by_clusters_and_without(
    emulator: emulated.Emulator, capability: int, dtype: torch.dtype, vocab: int
) -> None:
    emulator.device(capability=capability)
    logits, labels = drawn(3, vocab + 3, vocab, dtype)
    labels[0] = vocab - 1
    terms = (labels, vocab, 0.1, 1e-3, None)
    obeys(in_place(emulator.ops, logits.clone(), *terms), logits, *terms)


def test_a_row_wider_than_a_cluster(emulator: emulated.Emulator) -> None:
    logits, labels = drawn(1, 131080, 131080, torch.float32, seed=1)
    labels[0] = 131079
    terms = (labels, 131080, 0.0, 0.0, None)
    obeys(in_place(emulator.ops, logits.clone(), *terms), logits, *terms)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.bfloat16, 16393), (torch.float16, 33001), (torch.float32, 33001)])
def test_few_rows_share_a_large_gpu(
    emulator: emulated.Emulator, capability: int, dtype: torch.dtype, vocab: int
) -> None:
    """On sm_90 two, four and eight blocks a row; the last block of a row may have little or nothing of it."""
    emulator.device(multiprocessors=132, capability=capability)
    logits, labels = drawn(3, vocab + 7, vocab, dtype)
    labels[0] = vocab - 1
    terms = (vocab, 0.1, 1e-3, None)
    shards = [shard.contiguous() for shard in logits.split([vocab - 5, 12], 1)]
    for got in (
        in_two(emulator.ops, logits, labels, *terms),
        in_place(emulator.ops, logits.clone(), labels, *terms),
        in_shards(emulator.ops, shards, labels, *terms),
    ):
        obeys(got, logits, labels, *terms)


@pytest.mark.parametrize("vocab", [100, 4099, 40000])
def test_any_order_of_warps_gives_the_same_bits(emulator: emulated.Emulator, vocab: int) -> None:
    logits, labels = drawn(4, vocab, vocab, torch.bfloat16)
    expected = all_ways(emulator.ops, logits, labels, vocab, 0.1, 1e-3, None)
    for seed in range(1, 4):
        emulator.schedule(seed)
        for got, bits in zip(all_ways(emulator.ops, logits, labels, vocab, 0.1, 1e-3, None), expected, strict=True):
            assert same(got, bits)


@pytest.mark.parametrize("label", [-1, 30, 2**40, -(2**63)])
def test_a_label_outside_the_vocabulary_poisons_its_row(emulator: emulated.Emulator, label: int) -> None:
    """The host does not look at labels; nothing outside of the row is read."""
    logits, labels = torch.zeros(3, 32), torch.tensor([0, label, IGNORE])
    terms = (labels, 30, 0.0, 0.0, None)
    shards = [emulator.guarded(shard) for shard in logits.split(16, 1)]
    for losses, gradient in (
        in_two(emulator.ops, emulator.guarded(logits), *terms),
        in_place(emulator.ops, emulator.guarded(logits), *terms),
        in_shards(emulator.ops, shards, *terms),
    ):
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient[1, :30].isnan().all() and not gradient[:, 30:].any() and not gradient[[0, 2]].isnan().any()


def test_what_cannot_be_is_said(emulator: emulated.Emulator) -> None:
    logits, labels = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)
    ops = emulator.ops
    with pytest.raises(ValueError, match=r"vocab 33 lies outside \[1, 32\]"):
        ops.cross_entropy(logits, labels, IGNORE, 0.0, 0.0, 33)
    with pytest.raises(ValueError, match=r"labels Long \[3\]"):
        ops.cross_entropy_(logits, labels[:3], None, IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match=r"label_smoothing 1.5"):
        ops.cross_entropy(logits, labels, IGNORE, 1.5, 0.0, 32)
    with pytest.raises(ValueError, match=r"labels are Int \[4\]; int64 on the device"):
        ops.cross_entropy(logits, labels.int(), IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match="dtype Double; the CUDA kernels take"):
        ops.cross_entropy(logits.double(), labels, IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match=r"dlosses is Double \[4\]; one Float per row"):
        ops.cross_entropy_(logits, labels, torch.ones(4, dtype=torch.float64), IGNORE, 0.0, 0.0, 32)
    with pytest.raises(ValueError, match="a shard from column -1 on of 64 columns"):
        ops.cross_entropy_local(logits, labels, -1, 64, IGNORE, False)
    with pytest.raises(ValueError, match=r"lse is Float \[3\]"):
        ops.cross_entropy_local_backward_(logits, labels, torch.zeros(3), None, 0, 64, IGNORE, 0.0, 0.0)


# What to change where, and what is said of it: a wrong result is so far "from fp64".
MUTATIONS = {
    "barrier": ("softmax_statistics.h", "    __syncthreads();\n", "", "from fp64"),
    "cluster": ("softmax_statistics.h", "    cluster_arrive();\n    cluster_wait();\n", "", "from fp64"),
    "leaves": ("softmax_statistics.h", "    cluster_wait();\n  }\n}\n\n}", "  }\n}\n\n}", "cluster, which has ended"),
    "bound": (
        "row_span.h",
        "tail = columns - head - vectors * N;",
        "tail = columns - vectors * N;",
        "of an allocation of 80012 bytes",
    ),
    "label": ("row_span.h", "vector % threads", "vector / threads", "from fp64"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated(loaded_emulator: emulated.Emulator, tmp_path: Path, mutation: str) -> None:
    """What is missing or shifted shows in rows that two blocks share, under one of four schedules."""
    *change, said = MUTATIONS[mutation]
    mutated = emulated.mutated(tmp_path, "cross_entropy", *change)
    logits, labels = drawn(2, 20003, 20003, torch.bfloat16)
    labels[:] = 10000

    with pytest.raises((AssertionError, RuntimeError), match=said):
        for seed in range(4):
            mutated.schedule(seed)
            terms = (mutated.guarded(logits), labels, 20003, 0.0, 0.0, None)
            obeys(in_two(mutated.ops, *terms), logits, labels, 20003, 0.0, 0.0, None)
