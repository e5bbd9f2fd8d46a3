"""Every knob with its type, default and unit: for `megapre train --help` and for the reference page."""

import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .schema import FAMILIES, Config


@dataclass(frozen=True)
class Knob:
    """One knob. `default` is TOML text, '' where there is none and the knob must be given."""

    section: str
    key: str
    type: str
    default: str
    unit: str
    description: str
    optional: bool
    is_text: bool
    repeated: bool = False
    """Whether the same kind of table was described before, as that of `data.valid[]` is by `data.train[]`."""


@cache
def describe() -> tuple[Knob, ...]:
    """All knobs in the order of the schema, with dotted keys; items of lists as `data.train[].prefix`."""
    return tuple(_walk(Config, "", "", set()))


def field_at(parts: Sequence[str]) -> Knob | None:
    """The knob that a dotted key names, or None."""
    key = ".".join(parts)
    return next((knob for knob in describe() if knob.key == key), None)


def help_text(width: int = 100) -> str:
    """The knobs in aligned columns of at most `width` characters, grouped by section."""
    rows = [knob for knob in describe() if not knob.repeated]
    column = max(len(knob.key) for knob in rows) + 2
    lines: list[str] = []
    for section, doc in _sections():
        lines += ["", f"{section}: {doc}" if section else doc]
        for knob in (row for row in rows if row.section == section):
            kind = f"{knob.type}, {knob.unit}" if knob.unit else knob.type
            text = f"{knob.description} [{kind}; {f'default {knob.default}' if knob.default else 'required'}]"
            wrapped = textwrap.wrap(text, width - column - 2, break_on_hyphens=False)
            lines += [f"  {knob.key:<{column}}{wrapped[0]}", *(" " * (column + 2) + more for more in wrapped[1:])]
    return "\n".join(lines).lstrip("\n")


def reference() -> str:
    """The knobs as a markdown page of tables, one a section."""
    lines = ["# Configuration", "", "A run is a TOML recipe plus overrides on the command line. Every knob there is:"]
    for section, doc in _sections():
        lines += ["", f"## `[{section}]`" if section else "## Top level", "", doc, ""]
        lines += ["| knob | type | default | unit | meaning |", "|---|---|---|---|---|"]
        for knob in (row for row in describe() if row.section == section and not row.repeated):
            default = f"`{knob.default}`" if knob.default else "required"
            cells = [f"`{knob.key}`", knob.type, default, knob.unit, knob.description]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, str]]:
    yield "", "Top level"
    for name, field in Config.model_fields.items():
        model = _model_of(field.annotation)
        if model is not None:
            yield name, (model.__doc__ or "").split("\n")[0]


def _walk(model: type[BaseModel], prefix: str, section: str, seen: set[type[BaseModel]]) -> Iterator[Knob]:
    repeated = model in seen
    seen.add(model)
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        inner = _model_of(field.annotation)
        if inner is not None and not prefix:
            yield from _walk(inner, key + ".", key, seen)
            continue
        yield _knob(key, field, section, repeated)
        if inner is not None:
            yield from _walk(inner, key + ("[]." if _is_list(field.annotation) else "."), section, seen)


def _knob(key: str, field: FieldInfo, section: str, repeated: bool) -> Knob:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    optional = type(None) in get_args(field.annotation)
    return Knob(
        section=section,
        key=key,
        type=_type(field.annotation),
        default=_default(key, field),
        unit=str(extra.get("unit", "")),
        description=field.description or "",
        optional=optional,
        is_text=field.annotation is str,
        repeated=repeated,
    )


def _default(key: str, field: FieldInfo) -> str:
    """TOML text of the default; where the family sets it, each family's value."""
    name = key.removeprefix("model.")
    if key.startswith("model.") and all(name in family for family in FAMILIES.values()):
        values = {family: _toml(values[name]) for family, values in FAMILIES.items()}
        if len(set(values.values())) > 1:
            return ", ".join(f"{value} ({family})" for family, value in values.items())
    if field.default is PydanticUndefined:
        return ""
    return _toml(field.default)


def _toml(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "[]"
    if isinstance(value, dict):
        return "{}"
    return str(value) or '""'


def _unwrapped(annotation: Any) -> Any:
    """`annotation` without Annotated and without `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in {Union, types.UnionType}:
        return _unwrapped(next(arg for arg in get_args(annotation) if arg is not type(None)))
    return annotation


def _is_list(annotation: Any) -> bool:
    return get_origin(_unwrapped(annotation)) is tuple


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, alone or in a list, or None."""
    inner = _unwrapped(annotation)
    if get_origin(inner) is tuple:
        inner = _unwrapped(get_args(inner)[0])
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _type(annotation: Any) -> str:
    inner = _unwrapped(annotation)
    if get_origin(inner) is Literal:
        return "|".join(get_args(inner))
    if _is_list(inner):
        return "list"
    if _model_of(inner) is not None or get_origin(inner) is Mapping or get_origin(inner) is dict:
        return "table"
    return {int: "int", float: "float", bool: "bool", str: "text"}.get(inner, "table")
