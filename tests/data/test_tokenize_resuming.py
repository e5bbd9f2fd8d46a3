"""Text files to datasets: what survives a failure, a full disk, a killed worker and an interruption."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from texts import hashes, jsonl

from megapre.data import DataError, Tokenizer
from megapre.data import shards as shards_module
from megapre.data.documents import expand
from megapre.data.shards import Options, encode, plan
from megapre.data.tokenize import run


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
