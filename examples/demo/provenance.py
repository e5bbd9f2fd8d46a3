"""PROVENANCE.md of a corpus: written from the rows of its manifest, so that the two cannot disagree."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

HEAD = """# Where this text comes from

English prose from Debian packages, made by `examples/demo/corpus.py` (this file too: do not edit it). One file a
package, one JSON object `{"text", "source", "title"}` a line, zstandard-compressed. A document is a page of a manual or
a chapter of a novel; `valid/` holds one in twenty-five, chosen by the hash of its name, and `train/` the others.
The copyright file of every package is in `licences/`, whole.

"""

FILES = """
## Files

| file | documents | bytes of text | bytes | sha256 |
|---|--:|--:|--:|---|
"""

DROPPED = """
## What was dropped, and why

Code, tables, menus and footers went with the HTML elements that hold them; the rest was judged by the paragraph
(`examples/demo/prose.py` has the rules and where they come from). A near-duplicate is a paragraph of which half of the
six-word shingles occurred before in the same package.

| name | pages | documents | paragraphs | kept | dropped |
|---|--:|--:|--:|--:|---|
"""


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    (out / "PROVENANCE.md").write_text(render(rows), encoding="utf-8")


def render(rows: list[dict[str, Any]]) -> str:
    packed = sum(file["size"] for row in rows for file in row["files"].values())
    text = HEAD + (
        f"{len(rows)} packages, {sum(row['documents'] for row in rows):,} documents, "
        f"{sum(row['bytes'] for row in rows):,} bytes of text in {packed:,} bytes.\n\n"
    )
    text += "| name | package | version | licence of the text | documents | bytes of text | sha256 of the package |\n"
    text += "|---|---|---|---|--:|--:|---|\n"
    for row in rows:
        text += (
            f"| {row['name']} | {row['package']} | {row['version']} | {row['licence']} | {row['documents']:,} "
            f"| {row['bytes']:,} | `{row['package_sha256']}` |\n"
        )
    stated = [row for row in rows if row["statement"]]
    if stated:
        text += "\nIn the words of the copyright files:\n\n"
        text += "".join(f"- **{row['name']}**: “{row['statement']}”\n" for row in stated)
    text += FILES
    for row in rows:
        for name, file in row["files"].items():
            text += f"| {name} | {file['documents']:,} | {file['bytes']:,} | {file['size']:,} | `{file['sha256']}` |\n"
    text += DROPPED
    total: Counter[str] = Counter()
    for row in rows:
        funnel = row["funnel"]
        total.update(funnel["dropped"])
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in funnel["dropped"].items())
        text += (
            f"| {row['name']} | {funnel['pages']:,} | {funnel['documents']:,} | {funnel['paragraphs']:,} "
            f"| {funnel['kept']:,} | {reasons} |\n"
        )
    text += f"\nIn all, {sum(total.values()):,} paragraphs: "
    return text + "; ".join(f"{count:,} {reason}" for reason, count in total.most_common()) + ".\n"
