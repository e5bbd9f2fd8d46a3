"""Text files to datasets: what is read, what is written, what is refused, and what survives an interruption."""

import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megapre.data import (
    DataError,
    IndexedDataset,
    Tokenizer,
    load_tokenizer,
    read_sidecar,
    tokenizer_path,
    train_tokenizer,
)
from megapre.data import shards as shards_module
from megapre.data.documents import expand, parts_of, records
from megapre.data.shards import Options, encode, plan
from megapre.data.tokenize import run

TEXTS = ["the cat sat on the mat", "", "naïve “quotes” 12³", "line one\nline two\n", "x" * 300, " the dog "]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("the cat sat on the mat, the dog on the cat; it's 12 o'clock\n" * 50)
    return train_tokenizer([folder / "text.txt"], "bpe", 280, folder / "tokenizer.json")


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({key: text, "n": i}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(path: Path, texts: list[str | None], rows: int = 2) -> None:
    parquet.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=rows)


def tokens_of(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.documents)]


def hashes(prefix: str) -> dict[str, str]:
    names = ("bin", "idx", "meta.json", "tokenizer.json")
    return {name: hashlib.sha256(Path(f"{prefix}.{name}").read_bytes()).hexdigest() for name in names}


class TestReading:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[[str], Path]:
        def write(ending: str) -> Path:
            path = tmp_path / f"x{ending}"
            content = jsonl(TEXTS)
            if ending == ".jsonl.gz":
                path.write_bytes(gzip.compress(content[:50]) + gzip.compress(content[50:]))
            elif ending == ".jsonl.zst":
                frames = [zstandard.compress(content[:70]), zstandard.compress(content[70:])]
                path.write_bytes(b"".join(frames))
            elif ending == ".parquet":
                write_parquet(path, list(TEXTS))
            elif ending == ".txt":
                path.write_bytes("\n<eod>\n".join(text or " " for text in TEXTS).encode())
            else:
                path.write_bytes(content)
            return path

        return write

    @pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
    def test_every_kind_gives_the_same(
        self, write: Callable[[str], Path], tmp_path: Path, tokenizer: Tokenizer, ending: str
    ) -> None:
        result = run([write(ending)], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        ids = [tokenizer.encode(text) for text in TEXTS]
        assert tokens_of(result.prefix) == [[*document, tokenizer.eos_id] if document else [] for document in ids]
        assert (result.documents, result.bytes) == (len(TEXTS), sum(len(text.encode()) for text in TEXTS))

    def test_text_files_are_one_document_or_several(
        self, write: Callable[[str], Path], tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        path = write(".txt")
        whole = run([path], tmp_path / "a", tokenizer.path, workers=1, progress=False)
        assert tokens_of(whole.prefix) == [[*tokenizer.encode(path.read_text(encoding="utf-8")), tokenizer.eos_id]]
        cut = run([path], tmp_path / "b", tokenizer.path, workers=1, progress=False, separator="<eod>")
        wanted = [(text or " ").strip("\n") for text in TEXTS]
        assert tokens_of(cut.prefix) == [[*tokenizer.encode(text), tokenizer.eos_id] for text in wanted]

    def test_a_separator_from_a_shell_may_name_line_ends(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "x.txt").write_text("the cat\n\nthe dog\non a mat")
        cut = run([tmp_path / "x.txt"], tmp_path / "out", tokenizer.path, workers=1, progress=False, separator=r"\n\n")
        assert cut.documents == 2

    def test_no_eos_and_another_key(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "x.jsonl").write_bytes(jsonl(TEXTS[:1], "body"))
        arguments = {"json_key": "body", "append_eos": False, "workers": 1, "progress": False}
        result = run([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer.path, **arguments)
        assert result.prefix == str(tmp_path / "out_body_document")
        assert tokens_of(result.prefix) == [tokenizer.encode(TEXTS[0])]
        sidecar = read_sidecar(result.prefix)
        assert sidecar is not None
        assert not sidecar.eos_appended

    @given(st.binary(max_size=200), st.integers(1, 40), st.sampled_from([b"\n", b"ab", b"aab"]))
    def test_cuts_lie_behind_separators_and_lose_nothing(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes, target: int, between: bytes
    ) -> None:
        content = bytes(b"ab\nc"[byte % 4] for byte in content) or b"a"
        path = tmp_path_factory.mktemp("cut") / ("x.jsonl" if between == b"\n" else "x.txt")
        path.write_bytes(content)
        separator = None if between == b"\n" else between.decode()
        parts = parts_of(str(path), target, separator)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == len(content)
        for part in parts[:-1]:
            assert part.stop - part.start >= target
            assert content[: part.stop].endswith(between)

    @given(
        st.lists(st.sampled_from(["{}", "", " ", "[1]", '{"text": "a"}', '{"text": 5}', "x" * 30])), st.integers(1, 50)
    )
    def test_lines_are_read_and_numbered_alike_however_a_file_is_cut(
        self, tmp_path_factory: pytest.TempPathFactory, lines: list[str], target: int
    ) -> None:
        path = tmp_path_factory.mktemp("lines") / "x.jsonl"
        path.write_text("\n".join(lines) + "\n")

        def read(target: int | None) -> list[tuple[str, str | None, str]]:
            return [
                (part.name(number), record.text, record.problem)
                for part in parts_of(str(path), target)
                for number, record in enumerate(records(part, "text"))
            ]

        whole = read(None)
        assert [name for name, _, _ in whole] == [f"{path} line {i + 1}" for i in range(len(lines) or 1)]
        assert read(target) == whole

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["the"]))
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthe")
        result = run([tmp_path], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        assert tokens_of(result.prefix) == [[*tokenizer.encode("the"), tokenizer.eos_id]] * 2

    def test_inputs_are_files_folders_and_patterns(self, tmp_path: Path) -> None:
        for name in ("b/2.txt", "b/1.jsonl", "b/c/3.parquet", "b/notes.md", "a.txt"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        names = [os.path.relpath(path, tmp_path) for path in expand([tmp_path / "b", tmp_path / "a.txt"])]
        assert names == ["b/1.jsonl", "b/2.txt", "b/c/3.parquet", "a.txt"]
        assert expand([f"{tmp_path}/**/*.txt"]) == [f"{tmp_path}/a.txt", f"{tmp_path}/b/2.txt"]
        for inputs, message in [
            ([tmp_path / "none.txt"], "none.txt does not exist"),
            ([f"{tmp_path}/*.jsonl"], "matches no file"),
            ([tmp_path / "b/notes.md"], "unknown ending"),
            ([tmp_path / "a.txt", f"{tmp_path}/*.txt"], r"a\.txt is named twice"),
            ([], "no input"),
        ]:
            with pytest.raises(DataError, match=message):
                expand(inputs)
        (tmp_path / "b/empty.jsonl").touch()
        with pytest.raises(DataError, match=r"empty\.jsonl is empty \(0 bytes\)"):
            expand([tmp_path / "b"])


LINES = [
    (b'{"text": "ok"}', ""),
    (b'{"text": "cut off', "broken JSON"),
    (b'{"body": "b", "n": 1}', "no key 'text'; there are 'body', 'n'"),
    (b'{"text": 7}', "of type int, not a string"),
    (b'{"text": null}', "of type NoneType"),
    (b'["text"]', "a JSON list, not an object"),
    (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
    (b'{"text": "\xff"}', "broken JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"n": ' + b"9" * 5000 + b', "text": ""}', "broken JSON: .*4300 digits"),
]


class TestBadInput:
    @pytest.mark.parametrize(("line", "message"), LINES[1:], ids=[message for _, message in LINES[1:]])
    def test_fail_names_file_line_and_reason(
        self, tmp_path: Path, tokenizer: Tokenizer, line: bytes, message: str
    ) -> None:
        (tmp_path / "x.jsonl").write_bytes(b'{"text": "ok"}\n\n' + line + b'\n{"text": "ok"}\n')
        with pytest.raises(DataError, match=rf"x\.jsonl line 3: .*{message}"):
            run([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]

    def test_skip_counts_and_names_them(
        self, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "x.jsonl").write_bytes(b"\n".join(line for line, _ in LINES) + b'\n{"text": "the end"}')
        write_parquet(tmp_path / "y.parquet", ["a", None, "b", None])
        (tmp_path / "z.txt").write_bytes(b"caf\xe9")
        result = run([tmp_path], tmp_path / "out", tokenizer.path, workers=1, on_error="skip")
        assert result.skipped == len(LINES) - 1 + 2 + 1
        assert result.documents == 4
        wanted = [f"x.jsonl line {i}" for i in range(2, len(LINES) + 1)] + [
            "y.parquet row 2",
            "y.parquet row 4",
            "z.txt",
        ]
        for name, problem in zip(wanted, result.problems, strict=True):
            assert f"/{name}: " in problem
        assert "byte 3 (0xe9) is not UTF-8" in result.problems[-1]
        out = capsys.readouterr().out
        assert "4 documents" in out
        assert "12 bad documents passed over:" in out
        assert "and 7 more" in out

    @pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
    @pytest.mark.parametrize("damage", ["cut", "flipped", "none"])
    def test_damaged_compressed_files(self, tmp_path: Path, tokenizer: Tokenizer, ending: str, damage: str) -> None:
        random = np.random.default_rng(0)
        content = jsonl(["".join(map(chr, random.integers(97, 123, 200))) for _ in range(500)])
        compress = gzip.compress if ending == ".jsonl.gz" else zstandard.ZstdCompressor(write_checksum=True).compress
        packed = bytearray(compress(content))
        if damage == "cut":
            del packed[len(packed) * 2 // 3 :]
        elif damage == "flipped":
            packed[len(packed) // 2] ^= 0x55
        path = tmp_path / f"x{ending}"
        path.write_bytes(packed)
        if damage == "none":
            assert run([path], tmp_path / "out", tokenizer.path, workers=1, progress=False).documents == 500
            return
        with pytest.raises(DataError, match=rf"x\{ending} line \d+: "):
            run([path], tmp_path / "out", tokenizer.path, workers=1, progress=False)

    def test_parquet(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        write_parquet(tmp_path / "x.parquet", ["a"])
        with pytest.raises(DataError, match=r"x\.parquet has no column 'body'; there are 'n', 'text'"):
            run([tmp_path / "x.parquet"], tmp_path / "out", tokenizer.path, "body", workers=1, progress=False)
        content = bytearray((tmp_path / "x.parquet").read_bytes())
        content[4:60] = b"\xff" * 56
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.parquet is damaged"):
            run([tmp_path / "x.parquet"], tmp_path / "out", tokenizer.path, "n", workers=1, progress=False)
        (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
        with pytest.raises(DataError, match=r"x\.parquet is no Parquet file"):
            run([tmp_path / "x.parquet"], tmp_path / "out", tokenizer.path, workers=1, progress=False)

    def test_nothing_to_tokenize(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "x.jsonl").write_bytes(jsonl(["", ""]))
        with pytest.raises(DataError, match="hold no text"):
            run([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        (tmp_path / "x.jsonl").write_bytes(b"{}\n{}\n")
        with pytest.raises(DataError, match=r"hold no text; 2 documents were bad, the first: .*x\.jsonl line 1"):
            run([tmp_path / "x.jsonl"], tmp_path / "o", tokenizer.path, workers=1, on_error="skip", progress=False)

    def test_tokenizer_and_options(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "x.txt").write_text("the")
        inputs, out = [tmp_path / "x.txt"], tmp_path / "out"
        with pytest.raises(DataError, match=r"none\.json does not exist"):
            run(inputs, out, tmp_path / "none.json")
        text = tokenizer.path.read_text(encoding="utf-8").replace("<|endoftext|>", "<other>")
        (tmp_path / "t.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="no end-of-document token; --no-eos"):
            run(inputs, out, tmp_path / "t.json")
        with pytest.raises(DataError, match="on_error 'ignore'"):
            run(inputs, out, tokenizer.path, on_error="ignore")
        with pytest.raises(DataError, match="cannot be written"):
            run(inputs, tmp_path / "x.txt" / "out", tokenizer.path)


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several files that make a dozen shards."""
    monkeypatch.setattr(shards_module, "SMALLEST", 2000)
    folder = tmp_path / "in"
    folder.mkdir()
    random = np.random.default_rng(1)
    words = ["the", "cat", "sat", "on", "mat", "dog", "it's", "o'clock", "naïve"]
    texts = [" ".join(random.choice(words, random.integers(0, 60))) for _ in range(100)]
    (folder / "a.jsonl").write_bytes(jsonl(texts[:60]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts[60:80])))
    write_parquet(folder / "c.parquet", list(texts[80:90]), rows=3)
    for i, text in enumerate(texts[90:]):
        (folder / f"d{i}.txt").write_text(text or "x", encoding="utf-8")
    return folder


def test_the_plan_covers_everything_once(many: Path) -> None:
    files = expand([many])
    shards = plan(files, None)
    assert len(shards) >= 5
    assert [shard.number for shard in shards] == list(range(len(shards)))
    read = [
        record.text
        for shard in shards
        for part in shard.parts
        for record in records(part, "text")
        if record.text is not None
    ]
    alone = [record.text for file in files for part in parts_of(file) for record in records(part, "text")]
    assert read == alone


def test_output_does_not_depend_on_workers(many: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = {}
    for workers in (1, 2, 3):
        result = run([many], tmp_path / f"w{workers}" / "out", tokenizer.path, workers=workers, progress=False)
        assert result.documents == 100
        assert sorted(os.listdir(tmp_path / f"w{workers}")) == sorted(
            Path(result.prefix).name + e for e in (".bin", ".idx", ".meta.json", ".tokenizer.json")
        )
        made[workers] = hashes(result.prefix)
    assert made[1] == made[2] == made[3]
    one_file = run([many], tmp_path / "again" / "out", tokenizer.path, workers=1, progress=False)
    assert hashes(one_file.prefix) == made[1]


def test_the_sidecar_says_what_is_there(many: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False).prefix
    sidecar, dataset = read_sidecar(prefix), IndexedDataset(prefix)
    assert sidecar is not None
    assert (sidecar.documents, sidecar.tokens) == (dataset.documents, dataset.tokens)
    assert (sidecar.vocab_size, sidecar.eos_id, sidecar.eos_appended) == (tokenizer.vocab_size, tokenizer.eos_id, True)
    assert sidecar.tokenizer_sha256 == tokenizer.sha256
    text = "".join(tokenizer.decode(dataset[i][:-1].tolist()) for i in range(len(dataset)))
    assert sidecar.bytes == len(text.encode())
    kept = tokenizer_path(prefix)
    assert kept is not None
    assert load_tokenizer(kept).sha256 == tokenizer.sha256


class TestResuming:
    @staticmethod
    def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Collects the numbers of the shards that are really made."""
        made: list[int] = []
        writer = shards_module.IndexedWriter

        def counting(prefix: str, **options: int) -> object:
            made.append(int(prefix[-5:]))
            return writer(prefix, **options)

        monkeypatch.setattr(shards_module, "IndexedWriter", counting)
        return made

    def test_finished_shards_are_kept(
        self, many: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = hashes(run([many], tmp_path / "whole/out", tokenizer.path, workers=1, progress=False).prefix)
        count = len(plan(expand([many]), None))
        bad = many / "d9.txt"
        good = bad.read_bytes()
        bad.write_bytes(good[:-1] + b"\xff")
        made = self.encoded(monkeypatch)
        with pytest.raises(DataError, match="not UTF-8"):
            run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        assert made == list(range(count))
        assert [path.name for path in tmp_path.glob("out*")] == ["out_text_document.parts"]
        bad.write_bytes(good)
        made.clear()
        result = run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        assert made == [count - 1]
        assert hashes(result.prefix) == whole
        assert not Path(f"{result.prefix}.parts").exists()

    @pytest.mark.parametrize("ending", ["json", "bin", "idx"])
    def test_a_damaged_shard_is_made_anew(
        self, many: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, ending: str
    ) -> None:
        options = Options(tokenizer.sha256, "text", True, "fail", None)
        shard = plan(expand([many]), None)[1]
        first = encode(shard, tmp_path, options, tokenizer, lambda _: None)
        made = self.encoded(monkeypatch)
        assert encode(shard, tmp_path, options, tokenizer, lambda _: None) == first
        assert made == []
        path = tmp_path / f"shard-00001.{ending}"
        path.write_bytes(path.read_bytes()[:-3])
        assert encode(shard, tmp_path, options, tokenizer, lambda _: None) == first
        assert made == [1]

    def test_other_options_make_other_shards(
        self, many: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shard = plan(expand([many]), None)[0]
        made = self.encoded(monkeypatch)
        for options in (
            Options(tokenizer.sha256, "text", True, "fail", None),
            Options(tokenizer.sha256, "text", False, "fail", None),
            Options(tokenizer.sha256, "text", False, "skip", None),
            Options("0" * 64, "text", False, "skip", None),
        ):
            encode(shard, tmp_path, options, tokenizer, lambda _: None)
        assert made == [0] * 4

    def test_the_same_again_is_left_alone_and_another_is_refused(
        self, many: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first = run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        stamp = os.stat(f"{first.prefix}.bin").st_mtime_ns
        again = run([many], tmp_path / "out", tokenizer.path, workers=1)
        assert (again.documents, again.tokens) == (first.documents, first.tokens)
        assert "up to date" in capsys.readouterr().out
        assert os.stat(f"{first.prefix}.bin").st_mtime_ns == stamp
        with pytest.raises(DataError, match="other inputs or with other options; remove it"):
            run([many], tmp_path / "out", tokenizer.path, workers=1, append_eos=False, progress=False)
        (many / "d1.txt").write_text("changed")
        with pytest.raises(DataError, match="other inputs"):
            run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        assert sorted(path.name for path in tmp_path.glob("out*")) == sorted(
            f"out_text_document.{e}" for e in ("bin", "idx", "meta.json", "tokenizer.json")
        )

    def test_a_killed_run_leaves_nothing_half_and_goes_on(
        self, many: Path, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        whole = hashes(run([many], tmp_path / "whole/out", tokenizer.path, workers=1, progress=False).prefix)
        script = (
            "import os, signal\n"
            "from megapre.data import shards, tokenize\n"
            "shards.SMALLEST, left = 2000, [4]\n"
            "write = shards.write_whole\n"
            "def counting(path, content):\n"
            "    left[0] -= 1\n"
            "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    write(path, content)\n"
            "shards.write_whole = counting\n"
            f"tokenize.run([{str(many)!r}], {str(tmp_path / 'out')!r}, {str(tokenizer.path)!r}, workers=1)\n"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
        assert [path.name for path in tmp_path.glob("out*")] == ["out_text_document.parts"]
        assert len(list(tmp_path.glob("out*/shard-*.json"))) == 3
        result = run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False)
        assert hashes(result.prefix) == whole

    def test_two_runs_at_once(self, many: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
        script = (
            "import sys\n"
            "from megapre.data import tokenize\n"
            f"with tokenize._working_folder({str(tmp_path / 'out_text_document')!r}):\n"
            "    print('locked', flush=True)\n"
            "    sys.stdin.read()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(DataError, match="another process is tokenizing"):
                run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False)
            other.communicate("")
        assert run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False).documents == 100


def test_of_several_failures_the_first_is_told(many: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = (many / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[20] = lines[50] = b"{\n"
    (many / "a.jsonl").write_bytes(b"".join(lines))
    (many / "d3.txt").write_bytes(b"\xff")
    for workers in (1, 3):
        with pytest.raises(DataError, match=r"a\.jsonl line 21: broken JSON"):
            run([many], tmp_path / f"out{workers}", tokenizer.path, workers=workers, progress=False)
        assert not list(tmp_path.glob(f"out{workers}*.bin"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    """The limit on the size of a file stands in for the end of the disk: the same error from the same call."""
    (tmp_path / "x.jsonl").write_bytes(jsonl(["the cat sat on the mat " * 1000] * 200))
    script = (
        "import resource, sys\n"
        "from megapre.data import DataError, tokenize\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "    try:\n"
        f"        tokenize.run([{str(tmp_path / 'x.jsonl')!r}], {str(tmp_path / 'out')!r},"
        f" {str(tokenizer.path)!r}, workers={workers}, progress=False)\n"
        "    except DataError as error:\n"
        "        sys.exit(f'told: {error}')\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.getcwd(),
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stderr.startswith("told: disk full: "), done.stderr
    assert "bytes free); make room and start again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*.bin"))
    assert not list(tmp_path.glob("out*/.*"))


def test_a_worker_that_dies_is_reported(many: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    def kill_one() -> None:
        """As the kernel does where memory ends."""
        for _ in range(200):
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for child in children:
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(DataError, match="a worker died"):
        run([many], tmp_path / "out", tokenizer.path, workers=2, progress=False)
    killer.join()
    assert run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False).documents == 100


def test_an_interrupt_ends_the_workers_and_keeps_their_shards(
    many: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        if list(tmp_path.glob("out*/shard-*.json")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megapre.data.progress.Progress.move_to", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run([many], tmp_path / "out", tokenizer.path, workers=2, progress=False)
    assert multiprocessing.active_children() == []
    assert not list(tmp_path.glob("out*.bin"))
    assert not list(tmp_path.glob("out*/.*"))
    kept = {path.name for path in tmp_path.glob("out*/shard-*.json")}
    made = TestResuming.encoded(monkeypatch)
    assert run([many], tmp_path / "out", tokenizer.path, workers=1, progress=False).documents == 100
    assert kept
    assert not kept & {f"shard-{number:05}.json" for number in made}


def test_progress_in_a_log(
    many: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megapre.data.progress.BETWEEN", 0.0)
    run([many], tmp_path / "out", tokenizer.path, workers=1)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1].startswith("tokenizing 100%, ")
    assert all(" MB/s, " in line and line.endswith("s left") for line in lines)
    assert captured.out.startswith(f"{tmp_path}/out_text_document: 100 documents, ")
    run([many], tmp_path / "quiet", tokenizer.path, workers=1, progress=False)
    assert capsys.readouterr() == ("", "")
