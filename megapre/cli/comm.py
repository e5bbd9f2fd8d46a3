"""bench comm, tune comm: what runs on several ranks, started by `megapre launch local` or torchrun."""

from typing import Literal

import click

from .options import DEVICE, OVERRIDES, RECIPE, WithKnobs, listed

OUT = "Folder for {}_<hardware>_<ranks>_<date>.json, .md."
PROFILE = click.option("--profile", default="", help="The file.  [default: ~/.config/megapre/comm-profile.json]")


@click.command("comm", cls=WithKnobs, short_help="Time collectives; tell latency and bandwidth.")
@click.argument("recipe", required=False)
@OVERRIDES
@click.option("--layout", default="", help="Instead of a recipe's, as in tp=2,pp=2; dp is what is left.")
@click.option("--axis", "axes", default="", help="tp, cp, dp, pp, world; with commas.  [default: all there are]")
@click.option("--collective", "collectives", default="", help="Names with commas.  [default: all; pp: what it needs]")
@click.option("--from", "smallest", default="1KiB", show_default=True, help="Smallest size.")
@click.option("--to", "largest", default="16MiB", show_default=True, help="Largest size.")
@click.option("--factor", default=2, show_default=True, type=click.IntRange(2), help="From a size to the next.")
@click.option("--repeats", default=25, show_default=True, type=click.IntRange(5), help="Times of each size at most.")
@DEVICE
@click.option("--out", type=click.Path(file_okay=False), help=OUT.format("comm"))
@click.option("--write-profile", is_flag=True, help="Let the planner use the latencies and bandwidths; see the docs.")
@PROFILE
def bench_comm(
    recipe: str | None,
    overrides: tuple[str, ...],
    layout: str,
    axes: str,
    collectives: str,
    smallest: str,
    largest: str,
    factor: int,
    repeats: int,
    device: Literal["auto", "cpu", "cuda"],
    out: str | None,
    write_profile: bool,
    profile: str,
) -> int:
    """Time the collectives on each axis of a layout, and tell latency and bandwidth.

    They are all_reduce, reduce_scatter, all_gather, broadcast, all_to_all and send_recv. Run it on all ranks:

    \b
    megapre launch local --nproc 4 bench comm --layout tp=2
    torchrun --nproc-per-node 8 -m megapre bench comm llama3-8b layout.tp=8 --to 1GiB --out results
    """
    from ..config import load
    from ..observe import bench_comm as bench

    cfg = load(recipe, overrides) if recipe else None
    request = bench.Request(
        axes=listed(axes),
        collectives=listed(collectives),
        smallest=bench.parse_size(smallest),
        largest=bench.parse_size(largest),
        factor=factor,
        repeats=repeats,
        device=device,
    )
    return bench.run(request, bench.layout_of(layout, cfg), out, write_profile, profile, cfg.comm if cfg else None)


@click.group()
def tune() -> None:
    """Find the settings that are fastest here."""


@tune.command("comm", cls=WithKnobs, short_help="Find the fastest settings of communication.")
@RECIPE
@OVERRIDES
@click.option("--only", default="", help="communicators, buckets, products; with commas.  [default: what there is]")
@click.option(
    "--margin", default=2.0, show_default=True, type=click.FloatRange(0, 50), help="Per cent to be faster by."
)
@click.option(
    "--error", default=1.0, show_default=True, type=click.FloatRange(0.001, 20), help="Per cent of wrong choices."
)
@click.option("--rounds", default=200, show_default=True, type=click.IntRange(1), help="Of each comparison at most.")
@click.option("--budget", default=120.0, show_default=True, type=click.FloatRange(1), help="Seconds of each, about.")
@click.option("--out", type=click.Path(file_okay=False), help=OUT.format("comm-tuned"))
@PROFILE
def tune_comm(
    recipe: str,
    overrides: tuple[str, ...],
    only: str,
    margin: float,
    error: float,
    rounds: int,
    budget: float,
    out: str | None,
    profile: str,
) -> int:
    """Measure RECIPE's communication under other settings, and write down those that are faster.

    Buckets of gradients, the ring of products (layout.overlap_products) and, on CUDA, channels, algorithm and protocol
    of the communicators. Each is compared with the default in turns; the default wins ties. A run uses the result where
    layout.comm_profile names it. Run it on all ranks:

    \b
    megapre launch local --nproc 4 tune comm debug layout.tp=2
    torchrun --nproc-per-node 8 -m megapre tune comm llama3-8b layout.tp=4
    """
    from ..config import load
    from ..observe import tune_comm as tuning

    request = tuning.Request(listed(only), margin / 100, error / 100, rounds, budget)
    return tuning.run(load(recipe, overrides), request, out, profile)
