"""Text files to datasets: what is refused, and what is skipped and counted."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import zstandard
from texts import jsonl, write_parquet

from megapre.data import DataError, Tokenizer
from megapre.data.tokenize import run

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
