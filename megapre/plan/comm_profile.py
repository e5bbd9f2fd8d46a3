"""What `megapre bench comm --write-profile` and `megapre tune comm` found out: one small file for each user.

    {"format": 1,
     "profiles": [{"key": {"device": "cuda", "hardware": "NVIDIA H100 80GB HBM3", ..., "tp": 8, "dp": 2},
                   "made": "2026-11-21",
                   "links": {"tp": {"all_reduce": {"latency": 1.1e-05, "bandwidth": 3.6e11, "error": 0.03,
                                                   "worst": 0.1, "times": {"1024": 1.2e-05, ...}}}}},
                  {"key": {"device": "cuda", ..., "dp": 2, "hidden": 4096, ..., "dtype": "bf16"},
                   "made": "2026-11-21",
                   "chosen": {"bucket_elements": 4194304, "options": {"tp": {"nccl": {"max_ctas": 16}}}}}]}

Links are in seconds and bytes/s of bus bandwidth (`plan.link`), by axis of the mesh and collective; they depend on
machines, software and layout (`parallel.tuned.key`). What was chosen depends on the recipe's work besides
(`parallel.tuned.work`). A profile counts only where its whole key is what is here. A home folder that several machines
share may hold one of each. The planner, which runs on any machine, is asked about a hardware and a layout, and takes
the newest profile of these.

MEGAPRE_COMM_PROFILE names another file.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .link import FACTORS, Link

FORMAT = 1
AUTO = "auto"
"""What a recipe calls the user's own file."""

Key = Mapping[str, str | int]
Links = Mapping[str, Mapping[str, Link]]
"""axis -> collective -> link."""
What = Literal["links", "chosen"]
COMMANDS: Mapping[What, str] = {"links": "megapre bench comm --write-profile", "chosen": "megapre tune comm"}
"""By what a profile may have: what writes it."""


@dataclass(frozen=True)
class Profile:
    """What was measured for one key. `chosen`: bucket_elements, overlap_products, options by axis, where the default
    was beaten; None where nothing was compared.
    """

    key: Key
    made: str = ""
    links: Links = field(default_factory=dict)
    chosen: Mapping[str, Any] | None = None


def path(named: str = "") -> Path:
    """The file that `named` stands for: "" and "auto" are the user's own."""
    named = named if named != AUTO else ""
    if named or os.environ.get("MEGAPRE_COMM_PROFILE"):
        return Path(named or os.environ["MEGAPRE_COMM_PROFILE"])
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "megapre" / "comm-profile.json"


def find(file: Path, here: Key, what: What) -> tuple[Profile | None, str]:
    """(the newest profile in `file` that has `what`, and whose key has all that `here` has; why there is none)."""
    found, why = profiles(file, what)
    if why:
        return None, why
    for profile in reversed(found):
        if not _differences(profile.key, here):
            return profile, ""
    closest = min((_differences(profile.key, here) for profile in reversed(found)), key=len)
    return None, f"{file} was measured elsewhere: {'; '.join(closest)}; measure again with `{COMMANDS[what]}`"


def profiles(file: Path, what: What) -> tuple[list[Profile], str]:
    """(those in `file` that have `what`, oldest first; why there are none)."""
    try:
        found = read(file)
    except FileNotFoundError:
        return [], f"there is no {file}; `{COMMANDS[what]}` makes one"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [], f"{file} cannot be read as a profile ({type(error).__name__}: {error}); write it again"
    having = [profile for profile in found if (profile.links if what == "links" else profile.chosen is not None)]
    return having, "" if having else f"{file} has nothing of that kind; `{COMMANDS[what]}` measures it"


def _differences(there: Key, here: Key) -> list[str]:
    return [
        f"{name} was {there.get(name, 'not given')} and is {value}"
        for name, value in here.items()
        if there.get(name) != value
    ]


def write(file: Path, key: Key, links: Links | None = None, chosen: Mapping[str, Any] | None = None) -> None:
    """Puts links, by axis and collective, and what was chosen in place of what `file` said of the same for `key`.

    `chosen` of None leaves what was chosen before as it is. A file that cannot be read is written anew. Raises OSError.
    """
    profiles: list[Profile] = []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        profiles = read(file)
    old = next((profile for profile in profiles if profile.key == key), Profile(key))
    merged = {axis: {**old.links.get(axis, {}), **of} for axis, of in (links or {}).items()}
    new = Profile(
        dict(key),
        datetime.date.today().isoformat(),
        {**old.links, **merged},
        old.chosen if chosen is None else dict(chosen),
    )
    kept = [profile for profile in profiles if profile.key != key]
    content = json.dumps({"format": FORMAT, "profiles": [_written(profile) for profile in (*kept, new)]}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(content + "\n", encoding="utf-8")
        os.replace(temporary, file)  # whole or not at all
    finally:
        temporary.unlink(missing_ok=True)


def read(file: Path) -> list[Profile]:
    """The profiles of a file, oldest first, all numbers looked at. OSError, ValueError and its like when it is none."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']} instead of {FORMAT}")
    return [
        Profile(
            dict(profile["key"]),
            str(profile["made"]),
            {
                axis: {collective: _link(collective, link) for collective, link in links.items()}
                for axis, links in profile.get("links", {}).items()
            },
            _chosen(profile["chosen"]) if "chosen" in profile else None,
        )
        for profile in content["profiles"]
    ]


def _written(profile: Profile) -> dict[str, Any]:
    """What the file says of it: links or choices, or both, as there are."""
    return {name: value for name, value in asdict(profile).items() if value is not None and (name != "links" or value)}


def _link(collective: str, numbers: Mapping[str, Any]) -> Link:
    if collective not in FACTORS:
        raise ValueError(f"{collective} is no collective")
    times = {int(size): float(seconds) for size, seconds in numbers.get("times", {}).items()}
    link = Link(**{name: float(value) for name, value in numbers.items() if name != "times"}, times=times)
    if not (link.latency >= 0 and link.bandwidth > 0 and all(size > 0 and times[size] > 0 for size in times)):
        raise ValueError(f"{dict(numbers)} is no link")
    return link


def _chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    known = {"bucket_elements": int, "overlap_products": bool, "options": dict}
    for name, value in given.items():
        if type(value) is not known.get(name) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{name} = {value!r} is nothing that a profile chooses")
    return dict(given)
