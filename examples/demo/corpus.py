"""Build a corpus of English prose from Debian documentation packages.

    python examples/demo/corpus.py                       the larger corpus, into data/corpus (`make corpus`)
    python examples/demo/corpus.py --shipped --out DIR   the one in this repository, examples/demo/corpus

Packages come through `apt-get download` (no root needed) into a cache; each becomes two files,
train/NAME.jsonl.zst and valid/NAME.jsonl.zst, one JSON object {"text", "source", "title"} a line. A package that
is already there, made from the same package file by the same code, is left alone: stop and start as you like.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/corpus"))
    parser.add_argument("--cache", type=Path, default=Path("data/packages"), help="where package files are kept")
    parser.add_argument("--shipped", action="store_true", help="only the packages of the corpus in the repository")
    arguments = parser.parse_args()
    try:
        build(arguments.out, arguments.cache, arguments.shipped)
    except (RuntimeError, OSError) as error:
        print(f"corpus: error: {error}", file=sys.stderr)
        return 2
    return 0


def build(out: Path, cache: Path, shipped: bool) -> None:
    """Download, convert and describe every source. Raises RuntimeError with what to do about it."""
    check_tools()
    import provenance

    table = tomllib.loads((HERE / "sources.toml").read_text())["source"]
    sources = [source for source in table if source.get("shipped") or not shipped]
    rows = []
    for number, source in enumerate(sources, 1):
        archive, version = download(source["package"], source["version"], cache)
        row = convert(source, archive, version, out)
        rows.append(row)
        print(
            f"[{number:2}/{len(sources)}] {source['package']:26} {version:24} "
            f"{row['documents']:5} documents  {row['bytes'] / 1e6:6.2f} MB of text"
        )
    provenance.write(out, rows)
    total = sum(row["bytes"] for row in rows) / 1e6
    packed = sum(file["size"] for row in rows for file in row["files"].values()) / 1e6
    print(f"corpus: {total:.1f} MB of text, {packed:.1f} MB compressed, in {out}; see {out / 'PROVENANCE.md'}")


def check_tools() -> None:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"{' and '.join(missing)} not found: the corpus is made from Debian packages and needs a Debian or Ubuntu "
            "system (a container will do: docker run -it -v $PWD:/megapre debian:12). The demo needs none of this: its "
            "text is in examples/demo/corpus"
        )
    try:
        import resiliparse  # noqa: F401
    except ImportError:
        raise RuntimeError("resiliparse is not installed; run: pip install 'megapre[curate]'") from None


def download(package: str, version: str, cache: Path) -> tuple[Path, str]:
    """The package file and its version: the pinned one where the archive still has it, else today's, and says so."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in (f"{package}={version}", package):
        pinned = cache / f"{package}_{version.replace(':', '%3a')}_all.deb"
        if name != package and pinned.exists():
            return pinned, version
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = ["apt-get", "download", "-q", name]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            files = list(Path(scratch).glob("*.deb"))
            if done.returncode == 0 and len(files) == 1:
                if name == package:
                    found = subprocess.check_output(["dpkg-deb", "-f", str(files[0]), "Version"], text=True).strip()
                    print(f"corpus: {package} {version} is no longer in the archive; using {found}")
                    version = found
                target = cache / files[0].name
                os.replace(files[0], target)
                return target, version
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise RuntimeError(
        f"apt-get cannot download {package}: {reason}. "
        "Run `apt-get update` (as root) first; the packages are those of Debian 12, main"
    )


def convert(source: dict[str, Any], archive: Path, version: str, out: Path) -> dict[str, Any]:
    """One package to its two files, and the row that describes them (also kept beside them, for the next run)."""
    name, package, digest = source["name"], source["package"], sha256(archive)
    recipe = hashlib.sha256(json.dumps(source, sort_keys=True).encode() + (HERE / "prose.py").read_bytes()).hexdigest()
    done = out / "manifest" / f"{name}.json"
    if done.exists():
        row: dict[str, Any] = json.loads(done.read_text())
        expected = {file: facts["sha256"] for file, facts in row["files"].items()}
        whole = all((out / file).exists() and sha256(out / file) == known for file, known in expected.items())
        if whole and row["package_sha256"] == digest and row["recipe_sha256"] == recipe:
            return row

    import prose

    pages, licence = unpack(archive, source)
    funnel = prose.Funnel()
    documents = list(prose.documents(source, pages, funnel))
    if not documents:
        raise RuntimeError(f"{package} {version}: no document left of {len(pages)} pages; its layout must have changed")
    if " ".join(source.get("statement", "").split()) not in " ".join(licence.split()):
        raise RuntimeError(
            f"{package} {version}: its copyright file no longer holds the statement in sources.toml; read it"
        )

    files = {}
    for part in ("train", "valid"):
        chosen = [d for d in documents if prose.held_out(d.id) == (part == "valid")]
        file = f"{part}/{name}.jsonl.zst"
        files[file] = {"documents": len(chosen), **write(out / file, chosen, f"{package} {version}")}
    (out / "licences").mkdir(parents=True, exist_ok=True)
    (out / "licences" / f"{name}.txt").write_text(licence, encoding="utf-8")
    row = {
        "name": name,
        "package": package,
        "version": version,
        "licence": source["licence"],
        "statement": " ".join(source.get("statement", "").split()),
        "package_sha256": digest,
        "recipe_sha256": recipe,
        "documents": len(documents),
        "bytes": sum(file["bytes"] for file in files.values()),
        "files": files,
        "funnel": funnel.row(),
    }
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(row, indent=2) + "\n")
    return row


def unpack(archive: Path, source: dict[str, Any]) -> tuple[dict[str, bytes], str]:
    """The wanted pages of a package by path, and its copyright file; nothing touches the disk."""
    pages, licence = {}, ""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    try:
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacker,
            tarfile.open(fileobj=unpacker.stdout, mode="r|") as tree,
        ):
            for member in tree:
                name, file = member.name.removeprefix("./"), tree.extractfile(member) if member.isfile() else None
                if file is None:
                    continue
                if name == f"usr/share/doc/{source['package']}/copyright":
                    licence = file.read().decode("utf-8", errors="replace")
                elif matches(name, source["pages"]) and not matches(name, source.get("without", [])):
                    pages[name] = file.read()
    except tarfile.TarError as error:
        raise RuntimeError(f"{archive} is not a whole package ({error}); delete it and try again") from None
    if not licence:
        raise RuntimeError(f"{archive} holds no copyright file, so its text cannot be used")
    return pages, licence


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def write(path: Path, documents: list[Any], source: str) -> dict[str, Any]:
    """Write through a temporary name, so that a file is whole or absent."""
    import zstandard

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": d.text, "source": source, "title": d.title}, ensure_ascii=False) for d in documents]
    packed = zstandard.ZstdCompressor(level=19, threads=0).compress("".join(line + "\n" for line in lines).encode())
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(packed)
    os.replace(temporary, path)
    return {
        "bytes": sum(len(d.text.encode()) for d in documents),
        "size": len(packed),
        "sha256": hashlib.sha256(packed).hexdigest(),
    }


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
