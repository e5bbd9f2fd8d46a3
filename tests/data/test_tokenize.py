"""Text files to datasets: what is read and what is written."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from texts import TEXTS, hashes, jsonl, tokens_of, write_parquet

from megapre.data import DataError, IndexedDataset, Tokenizer, load_tokenizer, read_sidecar, tokenizer_path
from megapre.data.documents import expand, parts_of, records
from megapre.data.shards import plan
from megapre.data.tokenize import run


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
