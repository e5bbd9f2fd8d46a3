"""What a rank really holds, action by action and in its flat buffers, against what the planner counts: to the byte."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from alive import Alive
from ranks import RunOn
from torch import Tensor

from megapre.config import Config, load
from megapre.data import GlobalBatch
from megapre.mesh import Mesh
from megapre.model import initialize
from megapre.model.decay import decays
from megapre.parallel.comm import Group, Place, connect
from megapre.parallel.data import FlatParameters
from megapre.plan.activations import stage_activations
from megapre.plan.memory import all_ranks
from megapre.plan.partition import layers_of_stages, schedule_of
from megapre.schedule.held import peak_kept
from megapre.train.bench import made_up
from megapre.train.machine import DTYPES
from megapre.train.stage import Feed, Stage, build_pieces, parameters, stream_shape
from megapre.train.step import Engine, connected

CPU = torch.device("cpu")
BASE = ["model.vocab=300", "model.layers=8", "batch.micro=1", "batch.global=4"]
LAYOUTS = {
    "1f1b": ["layout.pp=2", "layout.stages=[5, 3]"],
    "gpipe": ["layout.pp=2", "layout.schedule=gpipe", "model.family=gpt2"],
    "interleaved": ["layout.pp=2", "layout.vpp=2", "layout.stages=[3, 2, 2, 1]", "layout.recompute=['norm']"],
    "interleaved, blocks": ["layout.pp=2", "layout.vpp=2", "layout.recompute=['block']", "layout.recompute_layers=1"],
    "zb_h1": ["layout.pp=3", "layout.stages=[4, 3, 1]", "layout.schedule=zb_h1", "run.dtype=bf16"],
    "zb_h1, blocks": ["layout.pp=2", "layout.schedule=zb_h1", "layout.recompute=['block']"],
    "zbv": ["layout.pp=2", "layout.vpp=2", "layout.stages=[3, 2, 2, 1]", "layout.schedule=zbv", "model.tied=true"],
    "dualpipev": ["layout.pp=2", "layout.vpp=2", "layout.schedule=dualpipev", "model.family=gpt2", "model.bias=true"],
    "tp": ["layout.pp=2", "layout.schedule=zb_h1", "layout.tp=2", "layout.sequence_parallel=false"],
    "tp, sequence": ["layout.pp=2", "layout.schedule=zb_h1", "layout.tp=2"],
    "tp, sequence, gpt2": [
        "layout.pp=2",
        "layout.tp=2",
        "model.family=gpt2",
        "layout.recompute=['norm', 'activation']",
    ],
}


def held(cfg: Config, rank: int, tp: Group | None = None) -> list[int]:
    """Bytes that pipeline rank `rank` of `cfg` holds after each of its actions. What comes from peers is made up."""
    layout, dtype = cfg.layout, DTYPES[cfg.run.dtype]
    groups = replace(
        connect(Mesh(1), 0, CPU) if tp is None else connect(Mesh(layout.tp, tp=layout.tp), tp.index, CPU),
        rank=rank,
        pp=Group(tuple(range(layout.pp)), rank),
    )
    plan = schedule_of(cfg, 1)
    models = build_pieces(cfg, groups, plan)
    for model in models:
        initialize(model, 1)
    flat = FlatParameters(parameters(models), decays)
    feed = Feed(cfg.model.vocab, CPU, None)
    batch: GlobalBatch = next(made_up(cfg))
    feed.take(batch, 1.0)
    stages = [Stage(model, feed, flat, False) for model in models]
    flat.begin_step()
    known = [*(group.param for group in flat.groups), *(group.grad for group in flat.groups)]
    known += [feed.total, feed.per_token, feed.upstream]
    known += [part.labels for part in batch.micro_batches]
    known += [table for model in models if model.rotary is not None for table in (model.rotary.cos, model.rotary.sin)]

    def message(other: bool) -> Tensor | None:
        return torch.randn(stream_shape(cfg, groups)).to(dtype) if other else None

    found: list[int] = []
    with Alive(known) as alive:
        for kind, chunk, i in plan[rank]:
            stage, first, last = stages[chunk], models[chunk].piece.first, models[chunk].piece.last
            if kind == "F":
                part = batch.micro_batches[i]  # its tokens are copied, as to a device
                feed.micro_batches = (*[part] * i, replace(part, tokens=part.tokens.clone()))
                stage.forward(i, message(not first))
            elif kind == "B":
                stage.backward(i, message(not last))
            elif kind == "I":
                stage.backward_input(i, message(not last))
            else:
                stage.backward_weights(i)
            feed.micro_batches = ()
            if tp is not None:
                time.sleep(0.02)  # gloo's threads let go of what they have sent
            found.append(alive.bytes())
    return found


def held_by_one_of_two(cfg: Config, rank: int) -> list[int]:
    return held(cfg, rank, Group((0, 1), dist.get_rank()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_after_each_action_what_is_counted(name: str, run_on: RunOn) -> None:
    cfg = load("debug", [*BASE, *LAYOUTS[name]])
    plan = schedule_of(cfg, 1)
    stages = stage_activations(cfg, layers_of_stages(cfg))
    for rank, program in enumerate(plan):
        kept = [stages[plan.stage_of(rank, chunk)] for chunk in range(plan.chunks)]
        change = {"F": lambda k: k.whole, "B": lambda k: -k.whole, "I": lambda k: k.for_weights - k.whole}
        change["W"] = lambda k: -k.for_weights
        expected, now = [], 0
        for kind, chunk, _ in program:
            now += change[kind](kept[chunk])
            expected.append(now)
        assert now == 0
        ranks = run_on(2, held_by_one_of_two, cfg, rank) if cfg.layout.tp > 1 else [held(cfg, rank)]
        assert ranks == [expected] * len(ranks)
        between = peak_kept(program, [part._replace(in_forward=0, in_backward=0) for part in kept])
        assert between.total == max(ranks[0])


def buffers(cfg: Config) -> dict[str, int]:
    """Bytes of a rank's flat buffers and moments."""
    engine = Engine(cfg, CPU, connected(cfg, Place(dist.get_rank(), dist.get_world_size()), CPU))
    groups, optimizer = engine.flat.groups, engine.optimizer
    return {
        "weights": sum(group.param.nbytes for group in groups),
        "gradients": sum(group.grad.nbytes for group in groups),
        "master": sum(group.master.nbytes for group in groups if group.master is not group.param),
        "moments": sum(moment.nbytes for moment in optimizer.exp_avg + optimizer.exp_avg_sq),
    }


ODD = ["model.vocab=300", "model.hidden=72", "model.heads=4", "model.ffn=76", "batch.global=8", "batch.micro=1"]
STATES = {
    "dp": ["layout.dp=3", "run.dtype=bf16", "batch.global=6"],
    "dp, whole": ["layout.dp=2", "run.dtype=bf16", "layout.shard_optimizer=false"],
    "dp, fp32": ["layout.dp=4"],
    "dp, no master": ["layout.dp=2", "run.dtype=bf16", "optim.master=none", "optim.moments=bf16"],
    "dp, bf16 gradients": ["layout.dp=2", "run.dtype=bf16", "optim.grad_dtype=bf16"],
    "dp, pp, tied": ["layout.dp=2", "layout.pp=2", "model.family=gpt2", "model.vocab=300"],
    "pp, v, tied": ["layout.pp=2", "layout.vpp=2", "model.layers=4", "layout.schedule=zbv", "model.tied=true"],
    "tp, dp": ["layout.tp=2", "layout.dp=2", "run.dtype=bf16", "model.bias=true"],
    "tp, kv": ["layout.tp=4", "layout.dp=2", "model.qk_norm=true", "layout.sequence_parallel=false"],
}


@pytest.mark.parametrize("name", STATES)
def test_buffers_are_what_is_counted_gaps_included(name: str, run_on: RunOn) -> None:
    cfg = load("debug", [*ODD, *STATES[name]])
    layout = cfg.layout
    replicas = layout.dp or 1
    found = run_on(layout.pp * replicas * layout.tp, buffers, cfg)
    for rank, memory in enumerate(all_ranks(cfg)):
        of_rank = found[rank * replicas * layout.tp :: layout.tp][:replicas]  # the first of each tensor-parallel group
        counted = memory.as_json()
        assert of_rank == [{what: counted[what] for what in of_rank[0]}] * replicas
