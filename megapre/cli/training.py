"""train, launch, eval, sample: a model from its recipe to its text."""

import click

from .options import DEVICE, OVERRIDES, RECIPE, REORDER, RESUME, RUN, Launcher, WithKnobs


@click.command(cls=WithKnobs)
@RECIPE
@OVERRIDES
@RESUME
@REORDER
@click.option("--print-config", is_flag=True, help="Print the resolved config as TOML and stop.")
@click.option("--dry-run", is_flag=True, help="Print mesh, stages, memory and schedule on world=N ranks and stop.")
@click.option("--gpu", default="", help="What --dry-run plans for; a part will do.  [default: NVIDIA H100 80GB HBM3]")
def train(
    recipe: str,
    overrides: tuple[str, ...],
    resume: bool,
    reorder: bool,
    print_config: bool,
    dry_run: bool,
    gpu: str,
) -> int:
    """Train a model by a recipe.

    RECIPE with its KEY=VALUE overrides runs in the folder run.dir/name.

    \b
    megapre train gpt2-124m data.train=data/text run.steps=1000
    megapre train llama3-70b layout.pp=4 layout.vpp=2 --dry-run world=1024
    """
    from ..config import load, to_toml

    if dry_run:
        from ..observe import dry_run as dry

        world, overrides = dry.world_of(overrides)
        return dry.run(load(recipe, overrides), world, gpu or dry.GPU)
    cfg = load(recipe, overrides)
    if print_config:
        click.echo(to_toml(cfg), nl=False)
        return 0
    from ..train.moved import refuse_moved

    refuse_moved(recipe, cfg, overrides)
    from ..train import loop

    return loop.run(cfg, resume=resume, reorder=reorder)


@click.group()
def launch() -> None:
    """Train with several ranks."""


@launch.command("local", cls=Launcher)
@RECIPE
@OVERRIDES
@click.option("--nproc", default=0, type=click.IntRange(0), help="Ranks.  [default: as many as the layout needs]")
@RESUME
@REORDER
@click.option("--grace", default=300.0, show_default=True, type=click.FloatRange(0), help="Seconds to save and end in.")
def launch_local(recipe: str, overrides: tuple[str, ...], nproc: int, resume: bool, reorder: bool, grace: float) -> int:
    """Train by a recipe with several ranks on this machine.

    Starts `megapre train` for each rank, as torchrun would, shows what the ranks say line by line, and ends them
    together: upon Ctrl-C or SIGTERM, which all of them get, or when the first of them has failed. In place of a recipe,
    `bench step`, `bench comm` or `tune comm` with all that follows it runs on the ranks instead.

    \b
    megapre launch local my-run.toml layout.tp=2 --nproc 4
    megapre launch local --nproc 4 bench comm --layout tp=2
    """
    from ..config import load

    if [recipe, *overrides[:1]] in Launcher.VERBS:
        if nproc == 0 or resume:
            raise click.UsageError(f"{recipe} {overrides[0]} needs --nproc, before it, and has nothing to resume")
        from ..launch import local

        return local.run_verb([recipe, *overrides], nproc, grace)
    cfg = load(recipe, overrides)
    from ..launch import local

    return local.run(cfg, recipe, overrides, nproc, resume=resume, reorder=reorder, grace=grace)


@click.command("eval")
@RUN
@click.option("--data", default="", help="Dataset prefix, all of it.  [default: the run's own validation data]")
@click.option("--batches", default=0, show_default=True, type=click.IntRange(0), help="Micro-batches; 0 = all.")
@DEVICE
def evaluate(run: str, data: str, batches: int, device: str) -> None:
    """Loss, perplexity and bits per byte of RUN's newest checkpoint."""
    from ..train import evaluate

    evaluate.run(run, data, batches=batches, device=device)


@click.command()
@RUN
@click.option("--prompt", default="", help="Text to go on from; none begins a document.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="Length of a sample.")
@click.option(
    "--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0: always the likeliest."
)
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="Among the k likeliest; 0: all.")
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Among the likeliest of this sum; 1: all.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the first sample.")
@click.option("--num-samples", default=1, show_default=True, type=click.IntRange(1), help="With seed, seed + 1, ...")
@click.option("--explain", is_flag=True, help="At each step print the ten likeliest next tokens with probabilities.")
@DEVICE
def sample(
    run: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    num_samples: int,
    explain: bool,
    device: str,
) -> None:
    """Text from RUN's newest checkpoint."""
    from ..train import sample

    sample.run(
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        num_samples=num_samples,
        explain=explain,
        device=device,
    )
