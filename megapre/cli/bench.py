"""bench: time what runs."""

import os

import click

from .comm import bench_comm
from .options import DEVICE, OVERRIDES, RECIPE, WithKnobs, listed


@click.group()
def bench() -> None:
    """Time what runs."""


@bench.command("step", cls=WithKnobs, short_help="Time the real training step of RECIPE.")
@RECIPE
@OVERRIDES
@click.option("--steps", default=10, show_default=True, type=click.IntRange(1), help="Timed steps.")
@click.option("--warmup", default=3, show_default=True, type=click.IntRange(0), help="Steps before the timed ones.")
@click.option("--json", "json_path", type=click.Path(), help="Write the result here too.")
def bench_step(recipe: str, overrides: tuple[str, ...], steps: int, warmup: int, json_path: str | None) -> None:
    """Time the real training step of RECIPE, on its data or, where it names none, on made-up tokens."""
    from ..config import load

    cfg = load(recipe, overrides)
    from ..train import bench

    bench.step(cfg, steps=steps, warmup=warmup, json_path=json_path)


@bench.command("kernels", short_help="Time kernels against their peers and the machine.")
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    help="A recipe, for the sizes of its model, or sizes as in T=2048,H=4096. Can be repeated.  [default: gpt2-124m]",
)
@click.option("--tokens", default=2048, show_default=True, type=click.IntRange(1), help="T of a recipe's shapes.")
@click.option("--dtype", "dtypes", default="bf16", show_default=True, help="bf16, fp16, fp32, fp64; with commas.")
@click.option(
    "--provider", "providers", default="", help="With commas.  [default: all but reference; compile on a GPU alone]"
)
@click.option("--mode", "modes", default="", help="forward, backward, full; with commas.  [default: all]")
@click.option("--set", "named_set", default="", help="A named list of cases instead: targets, gpu, gpu-quick.")
@DEVICE
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="Of the CPU; 0: those of a run.")
@click.option(
    "--repeats", default=25, show_default=True, type=click.IntRange(1), help="Calls of each provider at most."
)
@click.option("--budget", default=100.0, show_default=True, type=click.FloatRange(1), help="Seconds, about.")
@click.option("--warm", is_flag=True, help="Leave in the caches what is there, instead of emptying them before a call.")
@click.option("--return-memory", is_flag=True, help="Let freed memory go back to the system, as plain torch does.")
@click.option(
    "--out", type=click.Path(file_okay=False), help="Folder for kernels_<hardware>_<date>.csv, .json, .md, .png."
)
@click.option("--policies", is_flag=True, help="Time the Triton kernels under other launch policies too.")
@click.option("--write-profile", is_flag=True, help="Let this machine's runs use what was fastest; see the docs.")
@click.option("--list", "list_only", is_flag=True, help="Print the ops, the sizes they need and their providers; stop.")
def bench_kernels(
    ops: tuple[str, ...],
    shapes: tuple[str, ...],
    tokens: int,
    dtypes: str,
    providers: str,
    modes: str,
    named_set: str,
    device: str,
    threads: int,
    repeats: int,
    budget: float,
    warm: bool,
    return_memory: bool,
    out: str | None,
    policies: bool,
    write_profile: bool,
    list_only: bool,
) -> int:
    """Time the implementations of each OP against their peers and against what the machine can do.

    \b
    megapre bench kernels
    megapre bench kernels rms_norm swiglu --shape llama3-8b --dtype bf16,fp32 --out results
    megapre bench kernels rms_norm --shape T=2048,H=4096 --provider native,torch,compile
    """
    if return_memory:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # torch reads it when it is imported, below
    from ..observe import bench_kernels, bench_request

    request = bench_request.Request(
        ops=ops,
        shapes=shapes,
        tokens=tokens,
        dtypes=listed(dtypes),
        providers=listed(providers),
        modes=listed(modes),
        named_set=named_set,
        device=device,
        threads=threads,
        repeats=repeats,
        budget=budget,
        cold=not warm,
        keep_memory=not return_memory,
        policies=policies,
    )
    return bench_kernels.show(device) if list_only else bench_kernels.run(request, out, write_profile)


bench.add_command(bench_comm)
