"""From a recipe and overrides to a Config, with every problem of both reported together."""

import contextlib
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from . import rules
from .describe import describe, field_at
from .errors import ConfigError
from .schema import Config


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(entry.name.removesuffix(".toml") for entry in _shipped().iterdir() if entry.name.endswith(".toml"))


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The config of `recipe` (a path, or the name of a shipped one) with `overrides` (`section.key=value`) applied.

    A value is a TOML literal (`2`, `3e-4`, `true`, `["a", "b"]`, `{prefix = "a", weight = 2}`) or a bare string;
    `none` takes an optional knob away. The last override of a key wins. The file of a schedule that the recipe names is
    looked for beside the recipe first. Raises ConfigError with all problems.
    """
    name, text = _read(recipe)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"not TOML: {error}{_quoted(text, str(error))}"], name) from None
    _find_schedule(raw, Path(name).parent)
    problems: list[str] = []
    for override in overrides:
        if problem := _override(raw, override):
            problems.append(problem)
    raw.setdefault("name", Path(name).stem)
    return _build(raw, problems, name)


def _build(raw: dict[str, Any], problems: list[str], source: str) -> Config:
    """The config; else one ConfigError with `problems`, those of the fields, and those of rules that can still run."""
    try:
        cfg = Config.model_validate(raw)
    except ValidationError as error:
        problems = problems + [line for detail in error.errors() for line in _explain(detail)]
        if not any(isinstance(_cause(detail), ConfigError) for detail in error.errors()):
            problems += rules.problems(_sections(raw), partial=True)
    else:
        if not problems:
            return cfg
    raise ConfigError(list(dict.fromkeys(problems)), source)


def _sections(raw: Mapping[str, Any]) -> dict[str, BaseModel]:
    """What parses of each section, without the knobs that do not: enough for the rules that read none of those."""
    parsed: dict[str, BaseModel] = {}
    for name, field in Config.model_fields.items():
        section, given = field.annotation, raw.get(name, {})
        if not (isinstance(section, type) and issubclass(section, BaseModel) and isinstance(given, dict)):
            continue
        try:
            parsed[name] = section.model_validate(given)
        except ValidationError as error:
            bad = {detail["loc"][0] for detail in error.errors()}
            with contextlib.suppress(ValidationError):  # a required knob is among them
                parsed[name] = section.model_validate({key: value for key, value in given.items() if key not in bad})
                for key in bad:  # its default must not answer for it
                    parsed[name].__dict__.pop(str(key), None)
    return parsed


def _shipped() -> Any:
    return resources.files("megapre") / "recipes"


def _read(recipe: str) -> tuple[str, str]:
    """Name to show and text of a recipe: a file if there is one, else the shipped recipe of that name."""
    path = Path(recipe)
    try:
        if path.is_file():
            return recipe, path.read_text(encoding="utf-8")
        if "/" not in recipe and recipe.removesuffix(".toml") in recipe_names():
            stem = recipe.removesuffix(".toml")
            return f"{stem}.toml", (_shipped() / f"{stem}.toml").read_text(encoding="utf-8")
        if path.is_dir():
            raise ConfigError([f"a folder, not a recipe; did you mean {path / 'config.toml'}?"], recipe)
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ConfigError([wrong], recipe) from None
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror or error}"], recipe) from None
    names = recipe_names()
    hint = _did_you_mean(Path(recipe).stem, names)
    raise ConfigError([f"no such file, and no shipped recipe of that name{hint}; shipped: {', '.join(names)}"], recipe)


def _find_schedule(raw: dict[str, Any], folder: Path) -> None:
    """Lets layout.schedule name the file in `folder`, that of the recipe, if there is one: a run folder can be moved,
    and its config used from anywhere.
    """
    layout = raw.get("layout")
    if not isinstance(layout, dict):
        return
    named = layout.get("schedule")
    if isinstance(named, str) and ("." in named or "/" in named) and (folder / named).is_file():
        layout["schedule"] = str(folder / named)


def _override(raw: dict[str, Any], override: str) -> str | None:
    """Write one `a.b=value` into the tables, or say why not."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return f"override {override!r}: not of the form section.key=value, as in optim.lr=3e-4"
    table: dict[str, Any] = raw
    for depth, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return f"override {override!r}: {'.'.join(parts[: depth + 1])} is a value, not a table"
    field = field_at(parts)
    if field is not None and field.optional and text.strip() == "none":
        table.pop(parts[-1], None)
        return None
    try:
        value = _literal(text.strip(), is_text=field is not None and field.is_text)
    except ValueError as error:
        return f"override {override!r}: {error}"
    table[parts[-1]] = value
    return None


def _literal(text: str, is_text: bool) -> Any:
    """The TOML value of `text`, or `text` itself where it is none. For text knobs only quotes make it a literal."""
    if is_text and text[:1] not in {'"', "'"}:
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in {"[", "{", '"', "'"}:  # meant as a literal: a bare string would hide the slip
            raise ValueError(f"not a TOML value: {error}; quote the whole argument in the shell") from None
        return text
    if len(parsed) != 1:
        raise ValueError("one value only, on one line")
    return parsed["value"]


def _cause(detail: ErrorDetails) -> object:
    return detail.get("ctx", {}).get("error")


def _explain(detail: ErrorDetails) -> list[str]:
    """pydantic's error in our words: the knob, what is wrong with the value, what would do."""
    cause = _cause(detail)
    if isinstance(cause, ConfigError):
        return cause.problems
    path = ".".join(str(part) for part in detail["loc"])
    context, kind, given = detail.get("ctx", {}), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return [f"{path}: no such key{_did_you_mean_key(detail['loc'])}"]
    if kind == "missing":
        knob = next((row for row in describe() if row.key == path), None)
        return [f"{path}: missing, and it has no default" + (f" ({knob.description})" if knob else "")]
    message = _MESSAGES[kind].format(**context) if kind in _MESSAGES else detail["msg"]
    hint = ""
    if kind == "literal_error" and isinstance(given, str):
        hint = _did_you_mean(given, re.findall(r"'([^']*)'", context["expected"]))
    return [f"{path}: {message}, got {_shown(given)}{hint}"]


_MESSAGES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "mapping_type": "must be a table",
    "finite_number": "must be finite",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-', and begin with a letter or digit",
    "literal_error": "must be {expected}",
}


def _shown(value: object) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _quoted(text: str, message: str) -> str:
    """The line of `text` that tomllib's message speaks of."""
    found = re.search(r"at line (\d+)", message)
    line = text.splitlines()[int(found[1]) - 1].strip() if found else ""
    return f": {line}" if line else ""


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _did_you_mean_key(location: Sequence[str | int]) -> str:
    """The nearest key in the same table, else the place where a key of that name does exist, else what there is."""
    word, inside = str(location[-1]), ""
    for part in location[:-1]:
        inside = inside.removesuffix(".") + "[]." if isinstance(part, int) else f"{inside}{part}."
    keys = [knob.key for knob in describe()]
    siblings = sorted({key.removeprefix(inside).split(".")[0] for key in keys if key.startswith(inside)} - {word})
    if close := difflib.get_close_matches(word.lower(), siblings, n=1, cutoff=0.6):
        return f"; did you mean {'.'.join(str(part) for part in [*location[:-1], close[0]])}?"
    last = {key.rpartition(".")[2]: key for key in reversed(keys) if "[]" not in key}
    if close := difflib.get_close_matches(word.lower(), last, n=1, cutoff=0.75):
        return f"; did you mean {last[close[0]]}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""
