"""Fills the reference pages from the code when the site is built, so that they cannot say what the code does not.

A page that holds `<!-- generated: NAME -->` gets the text of the function of that name there (mkdocs hook).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import click

MARK = re.compile(r"<!-- generated: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page. Raises KeyError on a name there is no function for."""
    return MARK.sub(lambda match: GENERATED[match[1]](), markdown)


def config() -> str:
    from megapre.config.describe import reference

    return reference().split("\n", 1)[1]  # the page has its own title


def recipes() -> str:
    from megapre.config import load, recipe_names
    from megapre.plan import count

    rows = [
        "| recipe | family | layers | hidden | parameters | tokens a step | steps |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name in recipe_names():
        cfg = load(name)
        vocab = "" if cfg.model.vocab else " + vocabulary × hidden"
        rows.append(
            f"| `{name}` | {cfg.model.family} | {cfg.model.layers} | {cfg.model.hidden:,} "
            f"| {sum(count(cfg.model)):,}{vocab} | {cfg.batch.tokens:,} | {cfg.run.steps:,} |"
        )
    return "\n".join(rows)


def kernels() -> str:
    from megapre.kernels import table

    rows: dict[str, dict[str, list[str]]] = {}
    for device, elsewhere in (("cpu", ("triton", "cuda")), ("cuda", ("summed", "native"))):
        for row in table(device):  # by what the code serves, not by what this machine has
            if not any(word in row.implementation for word in elsewhere):
                rows.setdefault(row.op, {}).setdefault(device, []).append(f"`{row.implementation}`")
    lines = ["| op | CPU | CUDA |", "|---|---|---|"]
    lines += [f"| {op} | {', '.join(on.get('cpu', []))} | {', '.join(on.get('cuda', []))} |" for op, on in rows.items()]
    return "\n".join(lines)


def cli() -> str:
    from megapre.cli import cli as group

    return "\n".join(text for command in commands(group, "megapre") for text in command_page(*command))


def commands(command: click.Command, name: str) -> Iterator[tuple[click.Command, str]]:
    if isinstance(command, click.Group):
        for sub in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), sub)
            assert found is not None, "click lists commands that it has"
            yield from commands(found, f"{name} {sub}")
    else:
        yield command, name


def command_page(command: click.Command, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    yield f"\n## {name}\n"
    yield f"```\n{' '.join([name, *command.collect_usage_pieces(context)])}\n```\n"
    yield inspect.cleandoc(command.help or "").replace("\b\n", "") + "\n"
    options = [p for p in command.params if isinstance(p, click.Option)]
    if options:
        yield "| option | default | meaning |\n|---|---|---|"
    for option in options:
        flags = ", ".join(f"`{flag}`" for flag in option.opts)
        kind = "" if option.is_flag else f" {option.make_metavar(context)}".replace("|", " \\| ")
        default = "required" if option.required else f"`{option.default}`" if option.show_default else ""
        yield f"| {flags}{kind} | {default} | {option.help or ''} |"
    yield ""


GENERATED = {"config": config, "recipes": recipes, "kernels": kernels, "cli": cli}
