"""The pieces of a step that tuning times: under all settings they give the same bits, and another result shows."""

import pytest
import torch
import torch.distributed as dist
from ranks import RunOn

from megapre import kernels
from megapre.config import load
from megapre.mesh import Mesh
from megapre.parallel import exchange
from megapre.parallel.comm import connect
from megapre.parallel.tensor import TensorGroup
from megapre.parallel.trials import Exchange, LayerPair, Sizes

CPU = torch.device("cpu")


def sizes(dtype: torch.dtype, grad_dtype: torch.dtype = torch.float32) -> Sizes:
    return Sizes(tokens=24, hidden=48, ffn=80, matrices=5, dtype=dtype, grad_dtype=grad_dtype)


def exchanged(dtype: torch.dtype, grad_dtype: torch.dtype) -> dict[tuple[int, bool], list[str]]:
    groups = connect(Mesh(dist.get_world_size()), dist.get_rank(), CPU)
    found = {}
    for bucket in (1, 5000, 10**9):
        for sharded in (True, False):
            trial = Exchange(sizes(dtype, grad_dtype), groups.dp_cp, bucket, sharded, CPU)
            assert len(trial.flat.groups[0].buckets) == {1: 5, 5000: 2, 10**9: 1}[bucket]
            first = trial.checksum()
            trial()
            found[bucket, sharded] = [first, trial.checksum()]
    return found


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=["32", "16"])
def test_buckets_of_any_size_give_the_same_bits(
    run_on: RunOn, ranks: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    results = run_on(ranks, exchanged, *dtypes)
    assert {digest for found in results for pair in found.values() for digest in pair} == {results[0][1, True][0]}


def exchanged_wrongly() -> list[str]:
    groups = connect(Mesh(dist.get_world_size()), dist.get_rank(), CPU)
    trial = Exchange(sizes(torch.float32), groups.dp_cp, 5000, True, CPU)
    right = trial.checksum()
    real = exchange.reduce_scatter

    def off(out: torch.Tensor, grads: torch.Tensor, **options: object) -> object:
        grads[0] += 1
        return real(out, grads, **options)

    exchange.reduce_scatter = off
    try:
        return [right, trial.checksum()]
    finally:
        exchange.reduce_scatter = real


def test_a_wrong_sum_has_another_checksum(run_on: RunOn) -> None:
    assert all(right != wrong for right, wrong in run_on(2, exchanged_wrongly))


def paired(dtype: torch.dtype) -> dict[tuple[bool, bool], str]:
    world = dist.get_world_size()
    groups = connect(Mesh(world, tp=world), dist.get_rank(), CPU)
    ops = kernels.choose("cpu", None, dtype)
    assert groups.tp.handle is not None
    found = {}
    for sequence, ring in ((True, False), (True, True), (False, False)):
        tensor = TensorGroup(groups.tp.handle, groups.tp.index, world, sequence, ring)
        pair = LayerPair(sizes(dtype), tensor, ops, CPU)
        found[sequence, ring] = pair.checksum()
        assert len(pair.result) == (24 // world if sequence else 24) and pair.result.abs().max() > 0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_ring_gives_the_same_bits_as_the_collectives(run_on: RunOn, dtype: torch.dtype) -> None:
    results = run_on(4, paired, dtype)
    for found in results:
        assert found[True, False] == found[True, True]
    assert len({found[True, True] for found in results}) == 4, "each rank has its own tokens"
    assert len({found[False, False] for found in results}) == 1, "all have all"


def test_sizes_are_those_of_a_rank() -> None:
    cfg = load("debug", ["layout.tp=2", "layout.pp=2", "model.vocab=512", "optim.grad_dtype=fp32"])
    found = Sizes.of(cfg)
    assert (found.tokens, found.hidden, found.ffn, found.dtype) == (2 * 64, 64, 96, torch.float32)
    from megapre.plan import count

    assert found.elements == pytest.approx(sum(count(cfg.model)) / 4, abs=64**2)
    assert found.bytes == 8 * found.elements and found.within(found.bytes) == found
    assert found.within(8 * 3 * 64**2).matrices == 3 and found.within(1).matrices == 1
