"""schedule: the orders of micro-batches in a pipeline."""

from collections.abc import Callable

import click

from .options import OVERRIDES, WithKnobs

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


@click.group(short_help="Draw, check and compare pipeline schedules.")
def schedule() -> None:
    """Draw, check and compare the orders of micro-batches in a pipeline."""


@schedule.command("show")
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
    from ..observe import schedules

    found = schedules.find(schedule, ranks, chunks, micro_batches, group)
    return schedules.show(
        found, times=times, latency=latency, width=width, colour=colour, png=png, trace=trace, save=save
    )


@schedule.command("check", short_help="Say whether SCHEDULE is complete and cannot deadlock.")
@SCHEDULE
@_sized
@click.option("--in-flight", type=click.IntRange(1), help="Most activations that a rank may hold.")
@click.option("--unreceived", type=click.IntRange(0), help="Most messages of a kind on their way to a rank.")
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
    from ..observe import schedules

    found = schedules.find(schedule, ranks, chunks, micro_batches, group)
    return schedules.check(found, in_flight=in_flight, unreceived=unreceived)


@schedule.command("compare", cls=WithKnobs, short_help="Bubble, memory and messages of all schedules.")
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
@click.option(
    "--tp-link", default=300.0, show_default=True, type=click.FloatRange(0, min_open=True), help="GB/s of tp."
)
@click.option("--latency", default=10.0, show_default=True, type=click.FloatRange(0), help="Of a message, in us.")
@click.option("--comm-profile", default="", help="Instead: what bench comm measured; or auto.")
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
    tp_link: float,
    latency: float,
    comm_profile: str,
    times: str,
) -> int:
    """Bubble, memory and messages of all schedules for one layout, and the best within a limit.

    With RECIPE and its KEY=VALUE overrides, stages cost what its model's FLOPs take, with embedding and head; without,
    what --times says, and messages cost nothing.

    \b
    megapre schedule compare --ranks 8 --micro-batches 32 --in-flight 8
    megapre schedule compare llama3-70b --world 512 --memory 70
    """
    from ..observe import schedules

    if recipe is None:
        sizes = schedules.Sizes(ranks or 4, micro_batches or 16, schedules.numbers(chunks or "2", "chunks"))
        return schedules.compare(sizes, times=times, in_flight=in_flight, memory=memory)
    from ..config import load

    pipeline = [f"layout.pp={ranks}"] if ranks else []
    return schedules.compare_recipe(
        load(recipe, [*overrides, *pipeline]),
        micro_batches=micro_batches,
        chunks=chunks,
        world=world,
        gpu=gpu,
        mfu=mfu,
        link=link,
        tp_link=tp_link,
        latency=latency,
        in_flight=in_flight,
        memory=memory,
        comm_profile=comm_profile,
    )
