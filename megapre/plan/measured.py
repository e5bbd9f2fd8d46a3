"""What collectives take by a communication profile, for the planner: between the sizes and the groups measured.

Sizes are those of `Link.interpolated`. Of groups of another size than was measured, the next smaller and the next
larger one tell: the time over FACTORS of the collective lies on the line through them. That is exact for a ring, whose
2 (n - 1) steps of an all-reduce take latency a and S / n bytes at b seconds each:

    2 (n - 1) (a + S b / n) = 2 (n - 1) / n * (n a + S b)

Beyond the groups measured nothing is said. What a group takes depends on how far apart its ranks are, that is on the
axes that vary faster (`megapre.mesh`: tp, cp, dp, pp): a profile counts for an axis where these are as here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .comm_profile import COMMANDS, Key, profiles
from .link import FACTORS, Link

FASTER = {"tp": (), "cp": ("tp",), "dp": ("tp", "cp"), "pp": ("tp", "cp", "dp")}


@dataclass(frozen=True)
class Measured:
    """The links of one axis by collective and by the size of the group that they were measured in."""

    links: Mapping[str, Mapping[int, Link]]

    def seconds(self, collective: str, size: float, ranks: int) -> float:
        """Of one call; 0 among one rank. `ranks` lie within those measured."""
        if ranks == 1:
            return 0.0
        by_ranks, factor = self.links[collective], FACTORS[collective]
        if ranks in by_ranks:
            return by_ranks[ranks].interpolated(collective, size, ranks)
        low, high = around(ranks, by_ranks)
        a, b = (by_ranks[n].interpolated(collective, size, n) / factor(n) for n in (low, high))
        return factor(ranks) * (a + (b - a) * (ranks - low) / (high - low))


def around(ranks: int, sizes: Iterable[int]) -> tuple[int, int]:
    """The next smaller and larger of `sizes`; 0 where there is none."""
    return max((n for n in sizes if n < ranks), default=0), min((n for n in sizes if n > ranks), default=0)


def of_axis(file: Path, here: Key, axis: str, collectives: Sequence[str]) -> tuple[Measured | None, str]:
    """(what `file` says of `collectives` in the groups of `axis`, by which measurements), or (None, why nothing).

    `here` has the hardware and the sizes of tp, pp, cp and dp. Of several profiles that of just this layout counts,
    then the newest.
    """
    found, why = profiles(file, "links")
    if why:
        return None, why
    alike = [p for p in found if all(p.key.get(name) == here[name] for name in ("hardware", *FASTER[axis]))]
    alike.sort(key=lambda p: all(p.key.get(name) == size for name, size in here.items()))  # stable: newest last
    by_ranks: dict[int, Mapping[str, Link]] = {}
    made: dict[int, str] = {}
    for profile in alike:
        ranks, links = profile.key.get(axis), profile.links.get(axis, {})
        if isinstance(ranks, int) and all(name in links for name in collectives):
            by_ranks[ranks], made[ranks] = links, profile.made
    wanted = int(here[axis])
    used = (wanted,) if wanted in by_ranks else around(wanted, by_ranks)
    if not all(used):
        faster = "".join(f", {name} {here[name]}" for name in FASTER[axis])
        there = f" (there are those of {', '.join(map(str, sorted(by_ranks)))})" if by_ranks else ""
        return None, (
            f"{file} has no {' and '.join(collectives)} of {axis} {wanted} on {here['hardware']}{faster}{there}; "
            f"`{COMMANDS['links']}` measures them"
        )
    days = ", ".join(dict.fromkeys(made[ranks] for ranks in used))
    between = "" if len(used) == 1 else "interpolated between those "
    source = f"{between}measured among {' and '.join(map(str, used))} ranks ({file} of {days})"
    return Measured({name: {ranks: by_ranks[ranks][name] for ranks in used} for name in collectives}), source
