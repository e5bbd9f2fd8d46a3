"""Who this process is among the ranks, and the process groups that it talks through.

All groups are created at the beginning, on every rank in the one order of `order`, and each is used once at once: NCCL
would otherwise set up a communicator at its first use, in whatever order the ranks get there, and an interleaved
pipeline can deadlock in that (Megatron-LM pull request 5240).

A pipeline's channel is a group of its own for each direction. The operations of one NCCL communicator run one after the
other: in a group for both directions, a send of activations would stand before the receive of gradients on either side,
and both sides would wait for the other one's receive.

Groups of one rank have no communicator, and a world of one rank has no process group at all.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megapre.errors import UserError
from megapre.mesh import Mesh, spans

TIMEOUT = 600.0
"""Seconds after which waiting for another rank is an error, unless an axis has its own."""


# torch 2.13 has renamed them.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CommError(UserError):
    """Ranks that were not started as the layout needs them, a group that could not be made, an option unknown here."""


class RanksError(CommError):
    """What some ranks cannot go on with, raised alike on all of them. The first rank tells it for all."""


@dataclass(frozen=True)
class Place:
    """Who this process is: one of `world` ranks, and one of `local_world` on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def place(environment: Mapping[str, str]) -> Place:
    """The place that a launcher (torchrun, `megapre launch local`) tells by its variables; without them, the only rank.

    Raises CommError where variables are missing or contradict one another.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: environment[name] for name in names if name in environment}
    if not given:
        return Place()
    needed = [*names, "MASTER_ADDR", "MASTER_PORT"] if given.get("WORLD_SIZE", "1") != "1" else names
    if missing := [name for name in needed if name not in environment]:
        raise CommError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set, but not {', '.join(missing)}: start ranks "
            f"with torchrun or `megapre launch local`, or unset them for one rank"
        )
    told = ", ".join(f"{name} = {text}" for name, text in given.items())
    try:
        rank, world, local_rank, local_world = (int(given[name]) for name in names)
    except ValueError:
        raise CommError(f"not whole numbers: {told}") from None
    if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
        raise CommError(f"no rank stands there: {told}")
    return Place(rank, world, local_rank, local_world)


@dataclass(frozen=True)
class Options:
    """How the communicators of an axis are made.

    timeout: seconds until a stuck operation is an error. CUDA only: high_priority, whether kernels of the communicator
    run before those of other streams; nccl, fields of `ncclConfig_t` such as min_ctas, max_ctas, cga_cluster_size;
    environment, variables that NCCL reads while it makes a communicator, such as NCCL_ALGO and NCCL_PROTO
    (ncclTopoTuneModel in NCCL's src/graph/tuning.cc): they are set meanwhile.
    """

    timeout: float = TIMEOUT
    high_priority: bool = False
    nccl: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class Spec(NamedTuple):
    """One group to make. For a channel, ("send"), `ranks` are source and destination."""

    axis: str
    ranks: tuple[int, ...]


AXES = ("kv", "tp", "cp", "dp", "dp_cp", "pp", "embedding", "send")
"""What options can be given for, in the order of creation."""


def order(mesh: Mesh, embedding: bool = False, wrap: bool = False, kv: int = 1) -> Iterator[Spec]:
    """Every group of more than one rank, in the order in which all ranks make them.

    embedding: first and last rank of each pipeline share a tied embedding. wrap: the last rank of a pipeline also talks
    to the first, as in interleaved schedules. kv: so many neighbours in tp hold the same key-value heads. Within an
    axis no rank is in two groups that are made at the same time, so each axis is done in one round, and the channels in
    at most six, however long the pipeline.
    """
    if kv > 1:
        lines = mesh.groups("tp")
        yield from (Spec("kv", line[at : at + kv]) for line in lines for at in range(0, mesh.tp, kv))
    for axis, axes in (("tp", ("tp",)), ("cp", ("cp",)), ("dp", ("dp",)), ("dp_cp", ("dp", "cp")), ("pp", ("pp",))):
        if axis != "dp_cp" or mesh.cp > 1:  # else it is dp
            yield from (Spec(axis, ranks) for ranks in mesh.groups(*axes) if len(ranks) > 1)
    lines = mesh.groups("pp")
    if mesh.pp > 1 and embedding:
        yield from (Spec("embedding", (line[0], line[-1])) for line in lines)
    for first in (0, 1):  # 0-1, 2-3, ... and then 1-2, 3-4, ...: all of a round at once
        steps = range(first, mesh.pp - 1, 2)
        yield from (Spec("send", (line[s], line[s + 1])) for line in lines for s in steps)
        yield from (Spec("send", (line[s + 1], line[s])) for line in lines for s in steps)
    if mesh.pp > 2 and wrap:
        yield from (Spec("send", (line[-1], line[0])) for line in lines)
        yield from (Spec("send", (line[0], line[-1])) for line in lines)


@dataclass(frozen=True)
class Group:
    """A group that this process, `ranks[index]`, is in. `handle` is for torch.distributed, None for a group of one."""

    ranks: tuple[int, ...]
    index: int
    handle: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Groups:
    """The groups of this process. dp_cp sums gradients; kv holds the same key-value heads; `embedding` is None except
    on the ends of a pipeline that share a tied one; `send[peer]` and `receive[peer]` are the channels to and from the
    neighbours in the pipeline, in each of which the other end has index 1 - group.index.
    """

    mesh: Mesh
    rank: int
    device: torch.device
    world: Group
    tp: Group
    kv: Group
    cp: Group
    dp: Group
    dp_cp: Group
    pp: Group
    embedding: Group | None
    send: Mapping[int, Group]
    receive: Mapping[int, Group]


def join(here: Place, device: torch.device, timeout: float = TIMEOUT) -> None:
    """Meets all other ranks at MASTER_ADDR:MASTER_PORT. Does nothing in a world of one.

    On CUDA the group of the world takes CPU tensors too, over gloo: what ranks agree on need not wait for the device.
    """
    if here.world > 1:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend, rank=here.rank, world_size=here.world, timeout=timedelta(seconds=timeout)
        )  # no device_id: with one, NCCL would make each group by a split in which all ranks of the world must join


def everybody(here: Place) -> dist.ProcessGroup | None:
    """The group of all ranks that have joined; None where there is one."""
    return dist.group.WORLD if here.world > 1 else None


def leave() -> None:
    """Gives up all groups, after a run that went well. To be called when nothing refers to its `Groups` any more: the
    threads of a gloo group end when the group is freed, and one that lives at the end of the interpreter may abort it.
    """
    if dist.is_initialized():
        gc.collect()  # an engine refers to itself
        dist.destroy_process_group()


@contextmanager
def blaming_others(rank: int) -> Iterator[None]:
    """Raises CommError where an operation with other ranks fails in the block, in the place of torch's own error."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0].partition(". ")[0]
        slow = ". Where it is only slow, a longer comm.timeout waits for it" if "imed out" in reason else ""
        raise CommError(
            f"rank {rank}: an operation with other ranks failed. One of them has ended or hangs, and its own messages "
            f"say why; here it is: {reason}{slow}"
        ) from error


@contextmanager
def together(ranks: dist.ProcessGroup | None) -> Iterator[bool]:
    """Whether this is the first rank. Afterwards all ranks wait for each other, and where some of them have raised an
    OSError or a UserError, all raise a RanksError with each text once, and whose it is. The only rank raises its own.
    """
    error: OSError | UserError | None = None
    try:
        yield rank_in(ranks) == 0
    except (OSError, UserError) as raised:
        error = raised
    if ranks is None and error is not None:
        raise error
    said: dict[str, list[int]] = {}
    for rank, text in enumerate(gathered("" if error is None else f"{error}", ranks)):
        if text:
            said.setdefault(text, []).append(rank)
    if said:
        lines = [f"{spans(found)}: {text}" for text, found in said.items()]
        raise RanksError("\n".join(lines)) from error


@contextmanager
def first_alone(ranks: dist.ProcessGroup | None) -> Iterator[None]:
    """The first rank goes through the block alone, for the others to find what it leaves there."""
    first = rank_in(ranks) == 0
    if not first:
        gathered(None, ranks)
    try:
        yield
    finally:
        if first:
            gathered(None, ranks)


def gathered(own: Any, ranks: dist.ProcessGroup | None) -> list[Any]:
    """What every rank has, by rank: anything that can be pickled."""
    if ranks is None:
        return [own]
    parts: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(parts, own, group=ranks)
    return parts


def rank_in(ranks: dist.ProcessGroup | None) -> int:
    return 0 if ranks is None else dist.get_rank(ranks)


def connect(
    mesh: Mesh,
    rank: int,
    device: torch.device,
    *,
    embedding: bool = False,
    wrap: bool = False,
    kv: int = 1,
    options: Mapping[str, Options] | None = None,
) -> Groups:
    """Makes all groups of `mesh` (see `order`) and uses each once; after `join`, on all ranks.

    `options` are by axis, one of AXES. Raises CommError where the ranks that run are not those of the mesh, and where a
    group could not be made, naming it.
    """
    options = options or {}
    if unknown := sorted(options.keys() - set(AXES)):
        raise CommError(f"communication options for {', '.join(unknown)}; there are {', '.join(AXES)}")
    running = dist.get_world_size() if dist.is_initialized() else 1
    if running != mesh.world:
        raise CommError(f"layout: needs {mesh.world} ranks, {running} running:\n{mesh}")
    alone = Group((rank,), 0)
    whole = Group(tuple(range(mesh.world)), rank, dist.group.WORLD) if mesh.world > 1 else alone
    own = dict.fromkeys(("tp", "kv", "cp", "dp", "dp_cp", "pp"), alone)
    ends, send, receive = None, {}, {}
    for spec in order(mesh, embedding, wrap, kv):
        group = _made(spec, rank, device, options.get(spec.axis, Options()))
        if group is None:
            continue
        if spec.axis == "embedding":
            ends = group
        elif spec.axis != "send":
            own[spec.axis] = group
        elif rank == spec.ranks[0]:
            send[spec.ranks[1]] = group
        else:
            receive[spec.ranks[0]] = group
    if mesh.cp == 1:
        own["dp_cp"] = own["dp"]
    return Groups(
        mesh, rank, device, whole, **own, embedding=ends, send=MappingProxyType(send), receive=MappingProxyType(receive)
    )


def remake(mesh: Mesh, axis: str, rank: int, device: torch.device, options: Options) -> Group:
    """The group of `axis` ("tp", "cp", "dp", "dp_cp" or "pp") that `rank` is in, made once more with other options; by
    all ranks. Raises CommError where it could not be made, and where the axis has one rank.
    """
    own = None
    for spec in order(mesh):
        if spec.axis == axis:
            own = _made(spec, rank, device, options) or own
    if own is None:
        raise CommError(f"the {axis} axis has no groups of several ranks in\n{mesh}")
    return own


@contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that are set within; NCCL reads those of the process."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _made(spec: Spec, rank: int, device: torch.device, options: Options) -> Group | None:
    """The group, if `rank` is in it. Every rank must call this: torch counts groups to name them."""
    cuda = device.type == "cuda"
    try:
        with _variables(options.environment if cuda else {}):
            handle = dist.new_group(
                list(spec.ranks),
                timeout=timedelta(seconds=options.timeout),
                backend="nccl" if cuda else "gloo",
                pg_options=nccl_options(options) if cuda and rank in spec.ranks else None,
                group_desc=spec.axis,
                device_id=device if cuda else None,
            )
            if rank not in spec.ranks:
                return None
            ranks = tuple(sorted(spec.ranks))  # as torch numbers them, whatever the order given
            group = Group(ranks, ranks.index(rank), handle)
            _use(spec, group, device)
    except RuntimeError as error:  # of which torch's DistError is one
        raise CommError(f"rank {rank}: the {spec.axis} group of ranks {_short(spec.ranks)} failed: {error}") from error
    return group


def _use(spec: Spec, group: Group, device: torch.device) -> None:
    """The first operation of a group, here and now, on all of its ranks."""
    token = torch.ones(1, device=device)
    if spec.axis != "send":
        dist.all_reduce(token, group=group.handle)
        assert token.item() == group.size, f"a sum over {group.size} ranks gave {token.item()}"
    elif group.ranks[group.index] == spec.ranks[0]:
        dist.send(token, group=group.handle, group_dst=1 - group.index)
    else:
        dist.recv(token, group=group.handle, group_src=1 - group.index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def nccl_options(options: Options) -> Any:
    """`options` as `ProcessGroupNCCL.Options`. Raises CommError for a field this torch's NCCL does not have."""
    made = dist.ProcessGroupNCCL.Options(is_high_priority_stream=options.high_priority)
    known = [name for name in dir(made.config) if not name.startswith("_") and name != "unsafe_get_ptr"]
    for name, value in options.nccl.items():
        if name not in known:
            raise CommError(f"NCCL in torch {torch.__version__} has no option {name!r}; there are {', '.join(known)}")
        setattr(made.config, name, value)
    return made


def _short(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:4]))}, ... {ranks[-1]} ({len(ranks)} of them)"
