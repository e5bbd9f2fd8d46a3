"""The links that a plan counts with, and where each comes from: options, or what `megapre bench comm` found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import Layout
from ..plan import comm_profile
from ..plan.link import Link, Timed
from ..plan.measured import of_axis


@dataclass(frozen=True)
class Links:
    """Between two stages, among replicas and among tensor-parallel ranks; `sources` are lines of text, one for each
    that there is in the layout.
    """

    messages: Link
    replicas: Timed
    tensor: Timed | None
    sources: tuple[str, ...]


def links(named: str, gpu: str, layout: Layout, dp: int, messages: Link, tensor: Link | None) -> Links:
    """By the communication profile `named` ("" for none), of `gpu` as its driver calls it, in this layout of `dp`
    replicas; where it says nothing, `messages` for stages, what these take for replicas, and `tensor` (None: nothing).
    """
    here: dict[str, str | int] = {"hardware": gpu, "tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "dp": dp}
    file, lines, origin = comm_profile.path(named), [], "as given"
    if layout.pp > 1:
        link, source = _messages(file, here) if named else (None, "")
        lines.append(f"messages: {source if link else _instead(messages, origin, source)}")
        if link is not None:
            messages, origin = link, "as messages"
    replicas: Timed = messages
    if dp > 1:
        sums = ("reduce_scatter", "all_gather") if layout.shard_optimizer else ("all_reduce",)
        found, source = of_axis(file, here, "dp", sums) if named else (None, "")
        replicas = found or messages
        lines.append(f"replicas: {source if found else _instead(messages, origin, source)}")
    inside: Timed | None = tensor
    if layout.tp > 1:
        sums = ("all_gather", "reduce_scatter") if layout.sequence_parallel else ("all_reduce",)
        found, source = of_axis(file, here, "tp", sums) if named else (None, "")
        inside = found or tensor
        lines.append(f"tensor-parallel ranks: {source if found else _instead(tensor, 'as given', source)}")
    return Links(messages, replicas, inside, tuple(lines))


def _messages(file: Path, here: comm_profile.Key) -> tuple[Link | None, str]:
    """(that between two stages in `file`, its numbers and date), or (None, why there is none)."""
    profile, why = comm_profile.find(file, here, "links")
    if profile is None:
        return None, why
    link = profile.links.get("pp", {}).get("send_recv")
    if link is None:
        return None, f"{file} has no send_recv of the pp axis; `{comm_profile.COMMANDS['links']}` measures it"
    return link, f"{_numbers(link)}, measured ({file} of {profile.made})"


def _instead(link: Link | None, origin: str, why_not: str) -> str:
    taken = "counted as nothing" if link is None else f"{_numbers(link)}, {origin}"
    return f"{taken}; not measured: {why_not}" if why_not else taken


def _numbers(link: Link) -> str:
    return f"{link.bandwidth / 1e9:.4g} GB/s + {link.latency * 1e6:.4g} us"
