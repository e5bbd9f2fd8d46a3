"""The command line: each verb is a thin door to one room.

Only click is imported here. A verb imports its room when it runs: `megapre --help` needs neither torch nor patience.
"""

import os
import sys
from collections.abc import Callable

import click

from . import __version__

BROKEN, INTERRUPTED = 2, 130
"""Exit codes for what the user can mend, and for Ctrl-C."""

RECIPE = click.argument("recipe")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
INPUTS = click.argument("inputs", nargs=-1, required=True, type=click.Path())
AUTO = "auto: cuda where there is one."
DEVICE = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help=AUTO
)
KIND = "bpe: byte-level, a tokenizer.json; sentencepiece: a .model."
JSON_KEY = click.option("--json-key", default="text", show_default=True, help="Field or column with the text.")
RUN = click.argument("run", type=click.Path())


class WithKnobs(click.Command):
    """A command whose help ends with every knob of a recipe."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from .config import help_text, recipe_names

        formatter.write(f"\nRECIPE is a TOML file, or one of\n  {', '.join(recipe_names())}\n")
        formatter.write(f"\nKnobs, as in optim.lr=3e-4:\n\n{help_text()}\n")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="megapre")
def cli() -> None:
    """megapre pretrains large language models: raw text to tokens to a trained, sampled model.

    \b
    megapre tokenizer train text/*.txt --vocab-size 8192 --output tokenizer.json
    megapre tokenize text/*.txt --tokenizer tokenizer.json --output-prefix data/text
    megapre train gpt2-124m data.train=data/text run.steps=1000
    megapre sample runs/gpt2-124m --prompt "Once upon a time"
    """
    from .train import cpu_runtime

    cpu_runtime.before_torch(os.environ)


@cli.command(cls=WithKnobs)
@RECIPE
@OVERRIDES
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run folder.")
@click.option("--print-config", is_flag=True, help="Print the resolved config as TOML and stop.")
@click.option("--dry-run", is_flag=True, help="Print mesh, stages, memory and schedule on world=N ranks and stop.")
def train(recipe: str, overrides: tuple[str, ...], resume: bool, print_config: bool, dry_run: bool) -> int:
    """Train a model by a recipe.

    RECIPE with its KEY=VALUE overrides runs in the folder run.dir/name.

    \b
    megapre train gpt2-124m data.train=data/text run.steps=1000
    megapre train llama3-70b layout.pp=4 layout.vpp=2 --dry-run world=1024
    """
    from .config import load, to_toml

    if dry_run:
        from .observe import dry_run as dry

        world, overrides = dry.world_of(overrides)
        return dry.run(load(recipe, overrides), world)
    cfg = load(recipe, overrides)
    if print_config:
        click.echo(to_toml(cfg), nl=False)
        return 0
    from .train import loop

    return loop.run(cfg, resume=resume)


@cli.group()
def launch() -> None:
    """Train with several ranks."""


@launch.command("local", cls=WithKnobs)
@RECIPE
@OVERRIDES
@click.option("--nproc", default=0, type=click.IntRange(0), help="Ranks.  [default: as many as the layout needs]")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run folder.")
@click.option("--grace", default=300.0, show_default=True, type=click.FloatRange(0), help="Seconds to save and end in.")
def launch_local(recipe: str, overrides: tuple[str, ...], nproc: int, resume: bool, grace: float) -> int:
    """Train by a recipe with several ranks on this machine.

    Starts `megapre train` for each rank, as torchrun would, shows what the ranks say line by line, and ends them
    together: upon Ctrl-C or SIGTERM, which all of them get, or when the first of them has failed.
    """
    from .config import load

    cfg = load(recipe, overrides)
    from .launch import local

    return local.run(cfg, recipe, overrides, nproc, resume=resume, grace=grace)


@cli.command()
@INPUTS
@click.option("--tokenizer", required=True, type=click.Path(), help="tokenizer.json or .model.")
@click.option("--output-prefix", required=True, type=click.Path(), help="Writes PREFIX_text_document.bin, .idx.")
@JSON_KEY
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Processes; 0 = one a core.")
@click.option("--no-eos", is_flag=True, help="Append no end-of-document token.")
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Upon a bad document: stop there, or pass over it and count.",
)
@click.option("--separator", help="What stands between documents in .txt files.  [default: a file is a document]")
def tokenize(
    inputs: tuple[str, ...],
    tokenizer: str,
    output_prefix: str,
    json_key: str,
    workers: int,
    no_eos: bool,
    on_error: str,
    separator: str | None,
) -> None:
    """Turn text into a dataset of tokens.

    INPUTS are .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet files, or folders of them.
    """
    from .data import tokenize

    tokenize.run(
        inputs,
        output_prefix,
        tokenizer,
        json_key=json_key,
        workers=workers,
        append_eos=not no_eos,
        on_error=on_error,
        separator=separator,
    )


@cli.group("tokenizer")
def tokenizer_group() -> None:
    """Train tokenizers."""


@tokenizer_group.command("train")
@INPUTS
@click.option("--kind", type=click.Choice(["bpe", "sentencepiece"]), default="bpe", show_default=True, help=KIND)
@click.option("--vocab-size", required=True, type=click.IntRange(1), help="Tokens, special ones included.")
@click.option("--output", required=True, type=click.Path(), help="tokenizer.json or .model to write.")
@JSON_KEY
def tokenizer_train(inputs: tuple[str, ...], kind: str, vocab_size: int, output: str, json_key: str) -> None:
    """Train a tokenizer on text: byte-level BPE (tokenizer.json) or SentencePiece (.model)."""
    from .data.tokenizer import train_tokenizer

    train_tokenizer(inputs, kind=kind, vocab_size=vocab_size, out=output, json_key=json_key)


@cli.command("eval")
@RUN
@click.option("--data", default="", help="Dataset prefix, all of it.  [default: the run's own validation data]")
@click.option("--batches", default=0, show_default=True, type=click.IntRange(0), help="Micro-batches; 0 = all.")
@DEVICE
def evaluate(run: str, data: str, batches: int, device: str) -> None:
    """Loss, perplexity and bits per byte of RUN's newest checkpoint."""
    from .train import evaluate

    evaluate.run(run, data, batches=batches, device=device)


@cli.command()
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
    from .train import sample

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


@cli.group()
def bench() -> None:
    """Time what runs."""


@bench.command("step", cls=WithKnobs)
@RECIPE
@OVERRIDES
@click.option("--steps", default=10, show_default=True, type=click.IntRange(1), help="Timed steps.")
@click.option("--warmup", default=3, show_default=True, type=click.IntRange(0), help="Steps before the timed ones.")
@click.option("--json", "json_path", type=click.Path(), help="Write the result here too.")
def bench_step(recipe: str, overrides: tuple[str, ...], steps: int, warmup: int, json_path: str | None) -> None:
    """Time the real training step of RECIPE, on its data or, where it names none, on made-up tokens."""
    from .config import load

    cfg = load(recipe, overrides)
    from .train import bench

    bench.step(cfg, steps=steps, warmup=warmup, json_path=json_path)


@bench.command("kernels")
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    help="A recipe, for the sizes of its model, or sizes as in T=2048,H=4096. Can be repeated.  [default: gpt2-124m]",
)
@click.option("--tokens", default=2048, show_default=True, type=click.IntRange(1), help="T of a recipe's shapes.")
@click.option("--dtype", "dtypes", default="bf16", show_default=True, help="bf16, fp16, fp32, fp64; with commas.")
@click.option("--provider", "providers", default="", help="With commas.  [default: all but reference and compile]")
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
    from .observe import bench_kernels

    request = bench_kernels.Request(
        ops=ops,
        shapes=shapes,
        tokens=tokens,
        dtypes=_listed(dtypes),
        providers=_listed(providers),
        modes=_listed(modes),
        named_set=named_set,
        device=device,
        threads=threads,
        repeats=repeats,
        budget=budget,
        cold=not warm,
        keep_memory=not return_memory,
    )
    return bench_kernels.show(device) if list_only else bench_kernels.run(request, out, write_profile)


SCHEDULE = click.argument("schedule")
SIZES = (
    click.option("--ranks", default=4, show_default=True, type=click.IntRange(1), help="Of a named schedule."),
    click.option("--chunks", default=0, type=click.IntRange(0), help="Of a rank.  [default: fewest it can have]"),
    click.option("--micro-batches", default=8, show_default=True, type=click.IntRange(1), help="In a step."),
    click.option("--group", default=0, type=click.IntRange(0), help="Of interleaved.  [default: fewest]"),
)
TIMES = click.option(
    "--times",
    default="1,1,1",
    show_default=True,
    help="Of forward, input and weight gradient of a rank's chunks.",
)


def _sized(command: Callable[..., int]) -> Callable[..., int]:
    for option in reversed(SIZES):
        command = option(command)
    return command


@cli.group("schedule")
def schedule_group() -> None:
    """Draw, check and compare the orders of micro-batches in a pipeline."""


@schedule_group.command("show")
@SCHEDULE
@_sized
@TIMES
@click.option("--latency", default=0.0, show_default=True, type=click.FloatRange(0), help="Of a message, as times.")
@click.option("--width", default=0, type=click.IntRange(0), help="Characters.  [default: the terminal's]")
@click.option("--colour/--no-colour", default=None, help="Paint it.  [default: on a terminal]")
@click.option("--png", type=click.Path(dir_okay=False), help="Write a picture here too.")
@click.option("--trace", type=click.Path(dir_okay=False), help="Write a trace for ui.perfetto.dev here too.")
@click.option("--save", type=click.Path(dir_okay=False), help="Write the schedule as a file here too.")
def schedule_show(
    schedule: str,
    ranks: int,
    chunks: int,
    micro_batches: int,
    group: int,
    times: str,
    latency: float,
    width: int,
    colour: bool | None,
    png: str | None,
    trace: str | None,
    save: str | None,
) -> int:
    """Draw SCHEDULE, a name or a file, as it would run.

    \b
    megapre schedule show interleaved --ranks 4 --chunks 2 --micro-batches 8
    megapre schedule show mine.txt --times 1,1.1,0.9 --png mine.png
    """
    from .observe import schedules

    found = schedules.find(schedule, ranks, chunks, micro_batches, group)
    return schedules.show(
        found, times=times, latency=latency, width=width, colour=colour, png=png, trace=trace, save=save
    )


@schedule_group.command("check")
@SCHEDULE
@_sized
@click.option("--in-flight", type=click.IntRange(1), help="Most activations that a rank may hold.")
@click.option("--unreceived", type=click.IntRange(0), help="Most messages on their way in a channel.")
def schedule_check(
    schedule: str,
    ranks: int,
    chunks: int,
    micro_batches: int,
    group: int,
    in_flight: int | None,
    unreceived: int | None,
) -> int:
    """Say whether SCHEDULE, a name or a file, is complete and cannot deadlock. Exits with 1 where it is not."""
    from .observe import schedules

    found = schedules.find(schedule, ranks, chunks, micro_batches, group)
    return schedules.check(found, in_flight=in_flight, unreceived=unreceived)


@schedule_group.command("compare", cls=WithKnobs)
@click.argument("recipe", required=False)
@OVERRIDES
@click.option("--ranks", default=0, type=click.IntRange(0), help="Of the pipeline.  [default: layout.pp, or 4]")
@click.option("--micro-batches", default=0, type=click.IntRange(0), help="In a step.  [default: the recipe's, or 16]")
@click.option("--chunks", default="", help="Of a rank, with commas.  [default: layout.vpp, or 2]")
@click.option("--world", default=0, type=click.IntRange(0), help="Ranks in all, which give dp.  [default: layout.dp]")
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="Most GiB of a rank; needs RECIPE.")
@click.option("--in-flight", type=click.FloatRange(0, min_open=True), help="Most micro-batches' activations of a rank.")
@click.option("--gpu", default="NVIDIA H100 80GB HBM3", show_default=True, help="Whose peaks RECIPE's costs come from.")
@click.option("--mfu", default=0.5, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Of its peak.")
@click.option("--link", default=50.0, show_default=True, type=click.FloatRange(0, min_open=True), help="GB/s.")
@click.option("--latency", default=10.0, show_default=True, type=click.FloatRange(0), help="Of a message, in us.")
@TIMES
def schedule_compare(
    recipe: str | None,
    overrides: tuple[str, ...],
    ranks: int,
    micro_batches: int,
    chunks: str,
    world: int,
    memory: float | None,
    in_flight: float | None,
    gpu: str,
    mfu: float,
    link: float,
    latency: float,
    times: str,
) -> int:
    """Bubble, memory and messages of all schedules for one layout, and the best within a limit.

    With RECIPE and its KEY=VALUE overrides, stages cost what its model's FLOPs take, with embedding and head; without,
    what --times says, and messages cost nothing.

    \b
    megapre schedule compare --ranks 8 --micro-batches 32 --in-flight 8
    megapre schedule compare llama3-70b --world 512 --memory 70
    """
    from .observe import schedules

    if recipe is None:
        sizes = schedules.Sizes(ranks or 4, micro_batches or 16, schedules.numbers(chunks or "2", "chunks"))
        return schedules.compare(sizes, times=times, in_flight=in_flight, memory=memory)
    from .config import load

    pipeline = [f"layout.pp={ranks}"] if ranks else []
    return schedules.compare_recipe(
        load(recipe, [*overrides, *pipeline]),
        micro_batches=micro_batches,
        chunks=chunks,
        world=world,
        gpu=gpu,
        mfu=mfu,
        link=link,
        latency=latency,
        in_flight=in_flight,
        memory=memory,
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


@cli.command()
def doctor() -> int:
    """What this machine has, and what is used of it."""
    from .observe import doctor

    return doctor.run()


def main() -> None:
    """Run and exit with 0, the verb's own code, 1 for a bug, 2 for what the user can mend, or 130 for Ctrl-C."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("megapre: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `megapre ... | head`: nobody reads on, and the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        message = _mendable(error)
        if message is None or os.environ.get("MEGAPRE_TRACEBACK") == "1":
            raise
        click.echo(f"megapre: error: {message}", err=True)
        sys.exit(BROKEN)
    sys.exit(code or 0)


def _mendable(error: Exception) -> str | None:
    """What to tell the user about `error`, or None where it is a bug of ours and the traceback is the message."""
    from .errors import UserError

    # The kernels stand alone, so their errors are no UserErrors.
    if isinstance(error, UserError) or (isinstance(error, ValueError) and _home(error).startswith("megapre.kernels")):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("megapre"):
        return f"the Python package {error.name!r} is missing in {sys.executable}; `megapre doctor` lists what is there"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return None


def _home(error: Exception) -> str:
    """The module that defines the error's class."""
    return type(error).__module__


if __name__ == "__main__":
    main()
