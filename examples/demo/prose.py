"""From a page to paragraphs of running prose, with a reason for everything that is dropped.

The two corpora of the demo (the one in the repository and the larger one of `make corpus`) pass through this file.
A page is read by resiliparse; code, tables and navigation go with the elements that hold them; what is left is judged
paragraph by paragraph, because a page of documentation is half prose and half not.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str
from resiliparse.parse.html import HTMLTree

NOT_PROSE = ["nav", "header", "footer", "aside", "pre", "table", "dl.toc", "script", "style", "form", "figure"]
MIN_WORDS = 9  # of a paragraph
MIN_DOCUMENT_WORDS = 120
PLAIN_WORD = re.compile(r"[(\"']*[A-Za-z][A-Za-z'-]*[.,;:!?)\"']*|\u2014|-")
CODE = re.compile(r"[{}<>\\|]|==|://|\$\w")
COMMON = frozenset(
    [
        "the",
        "be",
        "to",
        "of",
        "and",
        "that",
        "have",
        "with",
        "is",
        "are",
        "in",
        "a",
        "it",
        "for",
        "as",
        "you",
        "this",
        "not",
    ]
)
TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\u2010": "-",
                            "\u2011": "-", "\u2026": "...", "\u2013": "-", "\u200b": None, "\u00ad": None})  # fmt: skip


@dataclass
class Funnel:
    """What came in, what went out, and why the rest did not: the rows of PROVENANCE.md."""

    pages: int = 0
    documents: int = 0
    paragraphs: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def row(self) -> dict[str, object]:
        return {**vars(self), "dropped": {reason: n for reason, n in self.dropped.most_common() if n}}


@dataclass(frozen=True)
class Document:
    id: str  # package, then the path of the page in it: stable, and what the split is made from
    title: str
    text: str


def verdict(paragraph: str) -> str | None:
    """Why `paragraph` is not running English prose; None if it is.

    The rules are those of Gopher (Rae et al. 2021, table A1) and C4 (Raffel et al. 2020, section 2.2), turned from
    documents to paragraphs and made stricter, as the source is technical documentation and the reader a small model.
    """
    words = paragraph.split()
    if len(words) < MIN_WORDS:
        return "short (headings, menus, list items)"
    if paragraph[-1] not in ".!?\"')" or not (paragraph[0].isupper() or paragraph[0] in "\"'("):
        return "not a sentence"
    plain = sum(bool(PLAIN_WORD.fullmatch(word)) for word in words)
    if plain < 0.85 * len(words) or CODE.search(paragraph):
        return "code, names or numbers"
    if len(COMMON.intersection(word.lower() for word in words)) < 3 or len(paragraph.encode()) > 1.03 * len(paragraph):
        return "not English"
    return None


class Repeats:
    """Remembers what was seen. A paragraph is a near-duplicate when half of its 6-word shingles were seen before.

    Shingles are thinned by their hash (one in four, Manber 1994) so that memory stays small.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, paragraph: str) -> bool:
        words = re.sub(r"[^a-z ]", "", paragraph.lower()).split()
        shingles = {zlib.crc32(" ".join(words[i : i + 6]).encode()) for i in range(max(1, len(words) - 5))}
        sampled = {shingle for shingle in shingles if shingle % 4 == 0} or {min(shingles)}
        known = len(sampled & self.seen)
        self.seen |= sampled
        return 2 * known >= len(sampled)


def page(html: bytes, main: str, skip: list[str]) -> tuple[str, list[str]]:
    """(title, paragraphs) of an HTML page; no paragraphs if nothing matches the selector `main`."""
    tree = HTMLTree.parse(bytes_to_str(html, "utf-8"))
    root: Any = tree.document.query_selector(main)
    title = (tree.title or "").translate(TYPOGRAPHY).strip()
    if root is None:
        return title, []
    text = extract_plain_text(
        root.html,
        preserve_formatting=True,
        list_bullets=False,
        alt_texts=False,
        skip_elements=NOT_PROSE + skip,
    ).translate(TYPOGRAPHY)
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return title, [p for p in paragraphs if p]


def prose(paragraphs: list[str], repeats: Repeats, funnel: Funnel) -> list[str]:
    """The paragraphs worth reading, in their order."""
    kept = []
    for paragraph in paragraphs:
        funnel.paragraphs += 1
        reason = verdict(paragraph) or ("near-duplicate" if repeats(paragraph) else None)
        if reason:
            funnel.dropped[reason] += 1
        else:
            kept.append(paragraph)
    if sum(len(p.split()) for p in kept) < MIN_DOCUMENT_WORDS:
        funnel.dropped[f"page with fewer than {MIN_DOCUMENT_WORDS} words of prose"] += len(kept)
        return []
    funnel.kept += len(kept)
    return kept


def r_strings(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: one zlib stream each, holding an XDR-serialised STRSXP.

    Format: R Internals, section 1.8 "Serialization Formats". Raises ValueError on any other content.
    """
    while database:
        stream = zlib.decompressobj()
        raw = stream.decompress(database[4:])  # 4 bytes of length before each stream
        database = stream.unused_data
        (encoding_bytes,) = struct.unpack_from(">i", raw, 14)
        at = 18 + encoding_bytes
        kind, count = struct.unpack_from(">ii", raw, at)
        if raw[:2] != b"X\n" or kind & 0xFF != 16:
            raise ValueError(f"not an XDR-serialised character vector: format {raw[:2]!r}, type {kind & 0xFF}")
        at += 8
        strings = []
        for _ in range(count):
            length = struct.unpack_from(">i", raw, at + 4)[0]
            strings.append(raw[at + 8 : at + 8 + length].decode("utf-8"))
            at += 8 + length
        yield strings


CHAPTER = re.compile(r"^(CHAPTER|Chapter) ([IVXLC]+|\d+)\.?$")


def chapters(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(title, paragraphs) of each chapter of a novel given as hard-wrapped lines; the title page is left out."""
    book = lines[0].strip().title().replace(" And ", " and ")
    number = 0
    block: list[str] = []
    paragraphs: list[str] = []
    for line in [*lines, "CHAPTER I"]:
        if CHAPTER.match(line.strip()):
            if number and paragraphs:
                yield f"{book}, chapter {number}", paragraphs
            number, paragraphs, block = number + 1, [], []
        elif line.strip():
            block.append(line.strip())
        elif block:
            paragraphs.append(clean_novel(" ".join(block)))
            block = []


def clean_novel(paragraph: str) -> str:
    """Typography of the transcription to the printed one: dashes, and no underscores for italics."""
    return " ".join(paragraph.replace("_", "").replace("--", "\u2014").translate(TYPOGRAPHY).split())


def novels(database: bytes, funnel: Funnel) -> Iterator[tuple[str, list[str]]]:
    """All chapters of all novels in the database of the R package janeaustenr."""
    for lines in r_strings(database):
        for title, paragraphs in chapters(lines):
            funnel.pages += 1
            funnel.paragraphs += len(paragraphs)
            kept = [p for p in paragraphs if any(c.islower() for c in p)]
            funnel.dropped["volume headings and ornaments"] += len(paragraphs) - len(kept)
            funnel.kept += len(kept)
            yield title, kept


def documents(source: Mapping[str, Any], pages: Mapping[str, bytes], funnel: Funnel) -> Iterator[Document]:
    """The documents of one package, in the order of their paths; `source` is its table in sources.toml."""
    package, repeats = source["package"], Repeats()
    for path in sorted(pages):
        if source.get("kind") == "novels":
            for title, paragraphs in novels(pages[path], funnel):
                funnel.documents += 1
                yield Document(f"{package}/{title}", title, "\n\n".join(paragraphs))
            continue
        funnel.pages += 1
        title, paragraphs = page(pages[path], source["main"], source.get("skip", []))
        for suffix in source.get("titles", []):
            title = title.removesuffix(suffix)
        kept = prose(paragraphs, repeats, funnel)
        if kept:
            funnel.documents += 1
            yield Document(f"{package}/{path}", title.strip() or PurePosixPath(path).stem, "\n\n".join(kept))


def held_out(identity: str, one_in: int = 25) -> bool:
    """Whether a document belongs to the validation set: decided by its name, so it never changes sides."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % one_in == 0
