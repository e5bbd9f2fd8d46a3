"""What several verbs take."""

import click

RECIPE = click.argument("recipe")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
INPUTS = click.argument("inputs", nargs=-1, required=True, type=click.Path())
AUTO = "auto: cuda where there is one."
DEVICE = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help=AUTO
)
JSON_KEY = click.option("--json-key", default="text", show_default=True, help="Field or column with the text.")
RUN = click.argument("run", type=click.Path())


def _of_a_run_that_goes_on(ctx: click.Context, _: click.Parameter, reorder: bool) -> bool:
    if reorder and not ctx.params["resume"]:
        raise click.UsageError("--reorder-data is for a run that goes on: it needs --resume")
    return reorder


RESUME = click.option(
    "--resume", is_flag=True, is_eager=True, help="Go on from the newest checkpoint of the run folder."
)
REORDER = click.option(
    "--reorder-data",
    "reorder",
    is_flag=True,
    callback=_of_a_run_that_goes_on,
    help="With --resume: though the samples come in another order now.",
)


class WithKnobs(click.Command):
    """A command whose help ends with every knob of a recipe."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..config import help_text, recipe_names

        formatter.write(f"\nRECIPE is a TOML file, or one of\n  {', '.join(recipe_names())}\n")
        formatter.write(f"\nKnobs, as in optim.lr=3e-4:\n\n{help_text()}\n")


class Launcher(WithKnobs):
    """A command that takes a recipe, or another verb for ranks with all that follows it."""

    VERBS = (["bench", "step"], ["bench", "comm"], ["tune", "comm"])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = next((at for at in range(len(args)) if args[at : at + 2] in self.VERBS), None)
        return super().parse_args(ctx, args if at is None else [*args[:at], "--", *args[at:]])


def listed(text: str) -> tuple[str, ...]:
    """The words with commas between them."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
