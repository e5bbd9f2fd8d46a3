"""What the documentation shows is what happens."""

from __future__ import annotations

import doctest
import re
import tomllib
from pathlib import Path

import click
import pytest

from megapre.cli.options import Launcher

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text(encoding="utf-8")], ids=lambda p: p.stem)
def test_python_sessions_print_what_they_show(page: Path) -> None:
    text = "\n".join(blocks(page, "python"))
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert session.examples
    runner = doctest.DocTestRunner()
    runner.run(session)
    assert runner.summarize(verbose=False).failed == 0


def commands(page: Path) -> list[list[str]]:
    """The megapre commands of a page, as words; one that another command launches on several ranks is one by itself."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    found = []
    for line in lines:
        for start in ("$ megapre ", " -m megapre "):
            _, has, after = line.partition(start)
            if line.startswith("$ ") and has:
                words = after.split("#")[0].split()
                cut = next((at for at in range(1, len(words)) if words[at : at + 2] in Launcher.VERBS), len(words))
                found += [part for part in (words[:cut], words[cut:]) if part]
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_commands_and_their_options_exist(page: Path) -> None:
    from megapre.cli import cli

    for words in commands(page):
        command: click.Command = cli
        while isinstance(command, click.Group):
            assert words[0] in command.commands, f"{page.name}: megapre {words[0]}"
            command = command.commands[words.pop(0)]
        known = {flag for option in command.params for flag in option.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, f"{page.name}: {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_knobs_that_are_named_exist(page: Path) -> None:
    from megapre.config.describe import describe

    known = {knob.key for knob in describe()}
    sections = {key.split(".")[0] for key in known if "." in key}
    words = [word.strip("'\"") for block in blocks(page, "console") for word in block.split()]
    named = {word.split("=")[0] for word in words if re.fullmatch(r"[a-z]+\.[a-z_.]+=\S+", word)}
    for body in blocks(page, "toml"):
        for section, table in tomllib.loads(body).items():
            named |= {f"{section}.{key}" for key in table}
    text = page.read_text(encoding="utf-8")
    named |= {word for word in re.findall(r"`([a-z]+\.[a-z_]+)(?: = [^`]*)?`", text) if word.split(".")[0] in sections}
    files = {word for word in named if (ROOT / word).exists() or word.endswith((".py", ".toml", ".json"))}
    assert named - files <= known


def test_navigation_lists_every_page_once() -> None:
    listed = re.findall(r"^\s+- ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and [link for link in links if not (ROOT / link).exists()] == []
