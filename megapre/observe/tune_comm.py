"""`megapre tune comm`: which settings of communication are faster than the defaults here, for a recipe's layout.

communicators   channels, algorithm and protocol of the tp and dp groups (CUDA; each in a communicator of its own)
buckets         elements of gradients that are summed together (layout.bucket)
products        the ring of exchanges beside products (layout.overlap_products)

in this order, each with what was chosen before. What is timed are pieces of a training step (`parallel.trials`); a
candidate whose checksum differs from the default's on any rank is refused; the test is that of `plan.paired`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import GPT2_VOCAB, Config
from ..data import with_vocab_of_data
from ..plan import comm_profile
from ..plan.paired import ERROR, MARGIN, ROUNDS, Verdict, best, compare
from .comm_ranks import BenchCommError, Ranks, on_ranks

if TYPE_CHECKING:
    from ..parallel.comm import Group
    from ..parallel.stopwatch import Watch
    from ..parallel.trials import Trial

PARTS = ("communicators", "buckets", "products")
COMMUNICATORS: Mapping[str, Mapping[str, Any]] = {
    "4 CTAs": {"nccl": {"max_ctas": 4}},
    "8 CTAs": {"nccl": {"max_ctas": 8}},
    "16 CTAs": {"nccl": {"max_ctas": 16}},
    "32 CTAs": {"nccl": {"min_ctas": 32, "max_ctas": 32}},
    "ring": {"environment": {"NCCL_ALGO": "Ring"}},
    "NVLS": {"environment": {"NCCL_ALGO": "NVLS"}},
    "LL128": {"environment": {"NCCL_PROTO": "LL128"}},
    "Simple": {"environment": {"NCCL_PROTO": "Simple"}},
    "high priority": {"high_priority": True},
}
"""Options by name (parallel.comm.Options). More CTAs move more bytes; fewer leave more of the GPU to products."""
MOST_BUCKETS = 64
MEMORY = 0.5  # of the device, for all candidates of a comparison together
LEAST = 0.02  # seconds that one candidate's turn lasts


@dataclass(frozen=True)
class Request:
    """What to tune (empty: all there is) and how sure to be; see plan.paired. `budget`: seconds of a comparison."""

    only: tuple[str, ...] = ()
    margin: float = MARGIN
    error: float = ERROR
    rounds: int = ROUNDS
    budget: float = 120.0


@dataclass(frozen=True)
class Comparison:
    """What was compared, the default's name and seconds, a verdict by candidate, and who won (None: the default)."""

    what: str
    default: str
    seconds: float
    verdicts: Mapping[str, Verdict]
    winner: str | None

    def said(self) -> str:
        if self.winner is None:
            return "the default stays"
        return f"chosen: {self.winner}, in {self.verdicts[self.winner].ratio:.3f} of the default's time"


def run(cfg: Config, request: Request, out: str | None = None, profile: str = "") -> int:
    """Measures on all ranks; the first prints, and writes files and profile. Returns 0.

    Raises BenchCommError, MeshError and CommError.
    """
    if unknown := [name for name in request.only if name not in PARTS]:
        raise BenchCommError(f"tune comm: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    cfg = with_vocab_of_data(cfg)
    if not cfg.model.vocab:
        cfg = cfg.with_vocab(GPT2_VOCAB)
    return on_ranks("tune", cfg.layout, cfg.run, cfg.comm, lambda ranks: _run(cfg, request, ranks, out, profile))


def _run(cfg: Config, request: Request, ranks: Ranks, out: str | None, profile: str) -> int:
    from rich.console import Console

    from ..parallel.tuned import work
    from . import comm_report

    console = Console(width=comm_report.width())
    if ranks.first:
        console.print(comm_report.header(ranks.about(), ranks.groups.mesh))
    tuning = Tuning(cfg, request, ranks)
    key = {**ranks.key(), **work(cfg, ranks.device)}
    comparisons = []
    for found in tuning.comparisons():
        comparisons.append(found)
        if ranks.first:
            console.print(comm_report.comparison(found))
    if not comparisons:
        raise BenchCommError(
            f"tune comm: nothing to tune: {'; '.join(tuning.left_out) or 'no part of it was asked for'}"
        )
    if ranks.first:
        for line in tuning.left_out:
            print(f"left out: {line}")
        if out is not None:
            about = {**ranks.about(), **key, "recipe": cfg.name, "margin": request.margin, "error": request.error}
            for line in comm_report.write_comparisons(comparisons, about, out):
                print(line)
        file = comm_profile.path(profile)
        old, _ = comm_profile.find(file, key, "chosen")
        before = (old.chosen if old else None) or {}
        kept = {name: value for name, value in before.items() if name not in tuning.measured}
        comm_profile.write(file, key, chosen={**kept, **tuning.chosen})
        named = profile or comm_profile.AUTO
        print(f"profile written to {file}; runs with layout.comm_profile={named} use it")
    return 0


class Tuning:
    """The comparisons for one recipe on the ranks that there are, and what came out so far. `measured` are the settings
    of a profile that were compared, `left_out` says what was not, and why.
    """

    def __init__(self, cfg: Config, request: Request, ranks: Ranks) -> None:
        from ..parallel.trials import Sizes
        from ..train.machine import memory_size

        self.cfg, self.request, self.ranks = cfg, request, ranks
        self.chosen: dict[str, Any] = {}
        self.measured: set[str] = set()
        self.left_out: list[str] = []
        whole = Sizes.of(cfg)
        sharers = ranks.here.local_world if ranks.device.type == "cpu" else 1
        room = MEMORY * memory_size(ranks.device) / sharers / (len(COMMUNICATORS) + 1)
        self.sizes = whole.within(-ranks.stopwatch.most(-room))  # the least of all ranks
        if self.sizes.elements < whole.elements:
            self.left_out.append(
                f"gradients beyond {self.sizes.elements:,} of {whole.elements:,} elements: all candidates are in memory"
            )
        groups = ranks.groups
        self.replicas = ("dp_cp" if groups.cp.size > 1 else "dp", groups.dp_cp)
        self.handles: dict[str, Group] = {"tp": groups.tp, self.replicas[0]: self.replicas[1]}

    def comparisons(self) -> Iterator[Comparison]:
        parts = {"communicators": self._communicators, "buckets": self._buckets, "products": self._products}
        for name, part in parts.items():
            if not self.request.only or name in self.request.only:
                yield from part()

    def _communicators(self) -> Iterator[Comparison]:
        if self.ranks.device.type != "cuda":
            self.left_out.append("communicators: gloo has no channels, algorithms or protocols to choose")
            return
        self.measured.add("options")
        for axis, group in list(self.handles.items()):
            if group.size == 1:
                continue
            if axis in (*self.cfg.comm.nccl, *self.cfg.comm.high_priority):
                self.left_out.append(f"communicators of {axis}: comm.nccl or comm.high_priority sets them")
                continue
            made: dict[str, Group] = {}
            found = self._race(
                f"communicators of {axis}",
                "NCCL's own choice",
                partial(self._trial, axis, group),
                {name: partial(self._remade, axis, name, made) for name in COMMUNICATORS},
            )
            if found.winner is not None:
                self.handles[axis] = made[found.winner]
                self.chosen.setdefault("options", {})[axis] = dict(COMMUNICATORS[found.winner])
            yield found

    def _buckets(self) -> Iterator[Comparison]:
        from ..plan.flat import BUCKET_ELEMENTS

        axis, group = self.replicas[0], self.handles[self.replicas[0]]
        if group.size == 1:
            self.left_out.append("buckets: there are no replicas, dp = 1")
            return
        if self.cfg.layout.bucket:
            self.left_out.append(f"buckets: layout.bucket = {self.cfg.layout.bucket:,} is set")
            return
        self.measured.add("bucket_elements")
        sizes = bucket_sizes(self.sizes.elements, BUCKET_ELEMENTS)
        if not sizes:
            self.left_out.append(f"buckets: {self.sizes.elements:,} elements of gradients are too few to cut")
            return
        found = self._race(
            f"buckets of {axis}",
            f"{BUCKET_ELEMENTS:,} elements",
            partial(self._exchange, group, BUCKET_ELEMENTS),
            {f"{size:,} elements": partial(self._exchange, group, size) for size in sizes},
        )
        if found.winner is not None:
            self.chosen["bucket_elements"] = int(found.winner.split()[0].replace(",", ""))
        yield found

    def _products(self) -> Iterator[Comparison]:
        layout, group = self.cfg.layout, self.handles["tp"]
        if group.size == 1 or not layout.sequence_parallel:
            self.left_out.append(f"products: tp = {group.size}, sequence_parallel = {layout.sequence_parallel}")
            return
        if "overlap_products" in layout.model_fields_set:
            self.left_out.append(f"products: layout.overlap_products = {layout.overlap_products} is set")
            return
        self.measured.add("overlap_products")
        found = self._race(
            "products of tp",
            "overlap_products = false",
            partial(self._tensor, group, ring=False),
            {"overlap_products = true": partial(self._tensor, group, ring=True)},
        )
        if found.winner is not None:
            self.chosen["overlap_products"] = True
        yield found

    def _remade(self, axis: str, name: str, made: dict[str, Group]) -> Trial:
        """The trial of `axis` in communicators with these options, which are kept in `made`."""
        from ..parallel.comm import remake
        from ..parallel.tuned import options_of

        groups = self.ranks.groups
        made[name] = remake(groups.mesh, axis, groups.rank, groups.device, options_of(COMMUNICATORS[name]))
        return self._trial(axis, made[name])

    def _trial(self, axis: str, group: Group) -> Trial:
        from ..plan.flat import BUCKET_ELEMENTS

        if axis == "tp":
            return self._tensor(group, self.cfg.layout.overlap_products)
        return self._exchange(group, self.cfg.layout.bucket or BUCKET_ELEMENTS)

    def _exchange(self, group: Group, bucket: int) -> Trial:
        from ..parallel.trials import Exchange

        return Exchange(self.sizes, group, bucket, self.cfg.layout.shard_optimizer, self.ranks.device)

    def _tensor(self, group: Group, ring: bool) -> Trial:
        from .. import kernels
        from ..parallel.tensor import TensorGroup
        from ..parallel.trials import LayerPair

        assert group.handle is not None, "an axis of several ranks has a group"
        cut = TensorGroup(group.handle, group.index, group.size, self.cfg.layout.sequence_parallel, ring)
        ops = kernels.choose(self.ranks.device.type, self.cfg.kernels, self.sizes.dtype)
        return LayerPair(self.sizes, cut, ops, self.ranks.device)

    def _race(
        self, what: str, name: str, default: Callable[[], Trial], candidates: Mapping[str, Callable[[], Trial]]
    ) -> Comparison:
        return race(what, name, default, candidates, self.ranks.stopwatch, self.request)


def race(
    what: str,
    name: str,
    default: Callable[[], Trial],
    candidates: Mapping[str, Callable[[], Trial]],
    watch: Watch,
    request: Request,
) -> Comparison:
    """Builds all, refuses those that cannot be built or give something else than the default, and compares the rest.

    All ranks come to the same result, provided that `watch` tells them the same times.
    """
    from ..parallel.stopwatch import calls_for

    plain = default()
    right = plain.checksum()
    built: dict[str, Trial] = {}
    verdicts: dict[str, Verdict] = {}
    for candidate, build in candidates.items():
        trial, why = _build(build, right)
        if watch.most(float(bool(why))):
            why = why or "another rank refused it"
            verdicts[candidate] = Verdict(candidate, 0, 0, 1.0, f"refused: {why}")
        elif trial is not None:
            built[candidate] = trial
    calls = calls_for(lambda count: watch(plain, count), LEAST)
    seconds = watch(plain, calls)
    affordable = int(request.budget / (seconds * calls * (len(built) + 1)))
    found = compare(
        partial(watch, plain, calls),
        {candidate: partial(watch, trial, calls) for candidate, trial in built.items()},
        margin=request.margin,
        error=request.error,
        rounds=max(min(request.rounds, affordable), 1),
    )
    ordered = {candidate: (found | verdicts)[candidate] for candidate in candidates}
    return Comparison(what, name, seconds, ordered, best(found))


def _build(build: Callable[[], Trial], right: str) -> tuple[Trial | None, str]:
    """The trial, and why it is refused: what went wrong when it was built or used, or another checksum."""
    try:
        trial = build()
        digest = trial.checksum()
    except (RuntimeError, ValueError) as error:  # of which torch's DistError and our CommError are two
        return None, str(error).splitlines()[0]
    return trial, "" if digest == right else f"its checksum {digest[:12]} is not the default's {right[:12]}"


def bucket_sizes(elements: int, default: int) -> list[int]:
    """Powers of two that cut `elements` into 2 to 64 buckets, but for those that cut as `default` does."""
    sizes = [2**power for power in range(12, 31) if 2 <= -(-elements // 2**power) <= MOST_BUCKETS]
    return [size for size in sizes if -(-elements // size) != -(-elements // default)]
