"""The shipped corpus is what its manifest and PROVENANCE.md say, and the rules that made it do what they claim."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
import zstandard

DEMO = Path(__file__).parents[2] / "examples" / "demo"
CORPUS = DEMO / "corpus"
ROWS = {path.stem: json.loads(path.read_text()) for path in sorted((CORPUS / "manifest").glob("*.json"))}
SOURCES = {row["name"]: row for row in tomllib.loads((DEMO / "sources.toml").read_text())["source"]}
NAMES = [name for row in ROWS.values() for name in row["files"]]


@pytest.fixture(autouse=True)
def demo_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    for name in ("corpus", "prose", "provenance"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def documents(name: str) -> list[dict[str, str]]:
    with (CORPUS / name).open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file).read().decode()
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def test_manifest_names_exactly_the_shipped_sources_and_files() -> None:
    assert set(ROWS) == {name for name, source in SOURCES.items() if source.get("shipped")}
    assert {str(path.relative_to(CORPUS)) for path in CORPUS.glob("*/*.jsonl.zst")} == set(NAMES)
    for name, row in ROWS.items():
        assert (row["package"], row["version"]) == (SOURCES[name]["package"], SOURCES[name]["version"])
        assert row["licence"] == SOURCES[name]["licence"]


@pytest.mark.parametrize("name", NAMES)
def test_file_is_the_one_that_was_described(name: str) -> None:
    row = ROWS[Path(name).name.removesuffix(".jsonl.zst")]
    expected, content = row["files"][name], (CORPUS / name).read_bytes()
    found = documents(name)
    assert hashlib.sha256(content).hexdigest() == expected["sha256"]
    assert len(content) == expected["size"]
    assert len(found) == expected["documents"]
    assert sum(len(document["text"].encode()) for document in found) == expected["bytes"]
    for document in found:
        assert set(document) == {"text", "source", "title"}
        assert document["text"].strip() == document["text"] != ""
        assert document["title"]
        assert document["source"] == f"{row['package']} {row['version']}"


def test_no_document_occurs_twice_and_validation_is_apart() -> None:
    seen: dict[str, str] = {}
    for name in NAMES:
        for document in documents(name):
            digest = hashlib.sha256(document["text"].encode()).hexdigest()
            assert digest not in seen, f"{document['title']} in {name} is also in {seen[digest]}"
            seen[digest] = name


def test_totals_of_the_rows_and_size_of_the_whole() -> None:
    for row in ROWS.values():
        assert (
            row["documents"] == sum(file["documents"] for file in row["files"].values()) == row["funnel"]["documents"]
        )
        assert row["bytes"] == sum(file["bytes"] for file in row["files"].values())
        funnel = row["funnel"]
        assert funnel["paragraphs"] == funnel["kept"] + sum(funnel["dropped"].values())
    assert 3e6 < sum((CORPUS / name).stat().st_size for name in NAMES) < 6e6


def test_provenance_says_what_the_manifest_says() -> None:
    import provenance

    order = [name for name in SOURCES if name in ROWS]
    assert (CORPUS / "PROVENANCE.md").read_text(encoding="utf-8") == provenance.render([ROWS[name] for name in order])


@pytest.mark.parametrize("name", ROWS)
def test_licence_is_there_and_holds_the_quoted_statement(name: str) -> None:
    licence = " ".join((CORPUS / "licences" / f"{name}.txt").read_text(encoding="utf-8").split())
    statement = ROWS[name]["statement"]
    assert statement and statement in licence
    assert statement == " ".join(SOURCES[name]["statement"].split())


@pytest.mark.parametrize("name", ROWS)
def test_shipped_split_is_the_one_by_name(name: str) -> None:
    """About one document in 25 is held out: 2 to 8% of each package."""
    files = ROWS[name]["files"]
    share = files[f"valid/{name}.jsonl.zst"]["documents"] / ROWS[name]["documents"]
    assert 0.01 < share < 0.08


class TestRules:
    """prose.py, where its HTML library is installed."""

    @pytest.fixture(autouse=True)
    def needs_resiliparse(self) -> None:
        pytest.importorskip("resiliparse")

    @pytest.mark.parametrize(
        ("paragraph", "reason"),
        [
            ("The server keeps a copy of the file, and it is read again when the lock of it is free.", None),
            ("Next chapter of the manual", "short (headings, menus, list items)"),
            ("the lower case begins this line of the list and it is not one with a capital.", "not a sentence"),
            ("The names that can be given here are all of these, and in the order of their use:", "not a sentence"),
            ("The value of x{1} is the first one and that of x{2} is the other of the two.", "code, names or numbers"),
            ("In it are 1 2 3 4 5 6 7 8 9 10 of the 11 that you have.", "code, names or numbers"),
            ("Der Server hat eine Kopie der Datei, die er danach wieder liest und schreibt.", "not English"),
        ],
    )
    def test_verdict(self, paragraph: str, reason: str | None) -> None:
        import prose

        assert prose.verdict(paragraph) == reason

    def test_near_duplicates_are_told_from_new_text(self) -> None:
        import prose

        repeats = prose.Repeats()
        first = " ".join(f"{chr(97 + i % 26)}{chr(97 + i % 7)}word" for i in range(60))
        other = " ".join(f"{chr(97 + i % 26)}{chr(97 + i % 11)}other" for i in range(60))
        assert [repeats(first), repeats(other), repeats(first), repeats(first + " Version 2.")] == [
            False,
            False,
            True,
            True,
        ]

    def test_page_takes_the_main_part_without_code_and_menus(self) -> None:
        import prose

        html = b"""<html><head><title>A page</title></head><body><nav>Menu of it</nav><main><h1>Head</h1>
            <p>One   two\n three \xe2\x80\x9cfour\xe2\x80\x9d.</p><pre>code = 1</pre>
            <table><tr><td>cell</td></tr></table>
            <p class="skip">gone</p><p>Five.</p></main><footer>Foot</footer></body></html>"""
        assert prose.page(html, "main", [".skip"]) == ("A page", ["Head", 'One two three "four".', "Five."])
        assert prose.page(html, "#nowhere", []) == ("A page", [])

    def test_novel_is_cut_into_chapters(self) -> None:
        import prose

        lines = ["A NOVEL", "", "by nobody", "", "CHAPTER I", "", "First line", "goes on--here.", "", "_Second_.", ""]
        lines += ["Chapter 2", "", "VOLUME II", "", "Third.", ""]
        funnel = prose.Funnel()
        found = list(prose.novels(lazy_load(lines), funnel))
        assert found == [
            ("A Novel, chapter 1", ["First line goes on\u2014here.", "Second."]),
            ("A Novel, chapter 2", ["Third."]),
        ]
        assert funnel.row() == {
            "pages": 2, "documents": 0, "paragraphs": 4, "kept": 3, "dropped": {"volume headings and ornaments": 1}
        }  # fmt: skip

    def test_other_r_objects_are_refused(self) -> None:
        import prose

        with pytest.raises(ValueError, match="type 13"):
            list(prose.r_strings(lazy_load(["x"], kind=13)))

    def test_documents_of_a_package_are_kept_by_path_and_counted(self) -> None:
        import prose

        sentence = "Page %s tells what the %s of the server is and how you can change it in a file that is read. "
        words = ["lock", "cache", "port", "name", "path", "rule", "list", "size", "user", "time"]
        pages = {
            f"b/{name}.html": f"<body><p>{''.join(sentence % (name, word) for word in words)}</p></body>".encode()
            for name in ("two", "one")
        } | {"b/short.html": b"<body><p>The end of it is here, and that is all there is to it.</p></body>"}
        funnel = prose.Funnel()
        found = list(prose.documents({"package": "p", "main": "body"}, pages, funnel))
        assert [document.id for document in found] == ["p/b/one.html"]  # two.html is a near-duplicate of it
        assert (funnel.pages, funnel.documents, funnel.paragraphs, funnel.kept) == (3, 1, 3, 1)
        assert sum(funnel.dropped.values()) == 2


def lazy_load(strings: list[str], kind: int = 16) -> bytes:
    """An R lazy-load database with one XDR-serialised vector of strings."""
    body = b"X\n" + struct.pack(">iii", 3, 0x040201, 0x030500) + struct.pack(">i", 5) + b"UTF-8"
    body += struct.pack(">ii", kind, len(strings))
    for string in strings:
        body += struct.pack(">ii", 0x00040009, len(string.encode())) + string.encode()
    return struct.pack(">I", len(body)) + zlib.compress(body)


def test_without_apt_the_larger_corpus_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import corpus

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["corpus.py", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    assert corpus.main() == 2
    assert "apt-get and dpkg-deb not found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
