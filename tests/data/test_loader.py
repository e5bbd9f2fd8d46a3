"""The loader: every rank its share, any number of ranks the same samples, and one number as its whole state."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpus import EOS, config, write_corpus

from megapre.config import Config
from megapre.data import (
    DataError,
    GlobalBatch,
    GPTDataset,
    IndexedWriter,
    Loader,
    build_loader,
    read_sidecar,
    write_sidecar,
)
from megapre.data.index_cache import cached
from megapre.data.prefetch import Prefetch
from megapre.data.sources import build_samples, sidecar_of


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "a")


def rows(batch: GlobalBatch) -> list[list[int]]:
    """The samples of a batch in the order of its micro-batches."""
    return [row for micro_batch in batch.micro_batches for row in micro_batch.tokens.tolist()]


def samples_in_order(cfg: Config) -> list[list[int]]:
    size = cfg.batch.global_ * cfg.run.steps
    samples = build_samples(cfg.data, "train", size, cfg.batch.seq_length, cfg.data.seed)
    return [samples.sample(i).tokens.tolist() for i in range(size)]


@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (2, 1), (1, 8), (2, 4), (4, 2), (1, 2)])
def test_ranks_share_the_blocks_of_a_step(corpus: str, micro: int, ranks: int) -> None:
    """Block b of a step is micro * ranks samples, of which rank r takes micro: any layout sees the same steps."""
    cfg = config([corpus], micro=micro)
    wanted = samples_in_order(cfg)
    loaders = [build_loader(cfg, "train", rank, ranks) for rank in range(ranks)]
    steps = list(zip(*loaders, strict=True))
    assert len(steps) == 6
    for step, batches in enumerate(steps):
        assert {batch.samples for batch in batches} == {8}
        assert {len(batch.micro_batches) for batch in batches} == {8 // (micro * ranks)}
        seen = [
            row
            for blocks in zip(*(batch.micro_batches for batch in batches), strict=True)
            for block in blocks
            for row in block.tokens.tolist()
        ]
        assert seen == wanted[8 * step : 8 * step + 8]
    assert {loader.consumed_samples for loader in loaders} == {48}


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_consumed_samples_is_the_whole_state(corpus: str, prefetch: int) -> None:
    cfg = config([corpus], prefetch=prefetch)
    whole = [rows(batch) for batch in build_loader(cfg, "train")]
    for stop in range(7):
        with build_loader(cfg, "train") as loader:
            for _ in range(stop):
                next(loader)
            consumed = loader.consumed_samples  # what was prefetched beyond it does not count
        assert consumed == 8 * stop
        with build_loader(cfg, "train", consumed_samples=consumed) as again:
            assert len(again) == 6 - stop
            assert [rows(batch) for batch in again] == whole[stop:]


def test_prefetch_gives_the_same_batches(corpus: str) -> None:
    options = {"document_mask": True, "reset_positions": True, "mask_eos_loss": True}
    plain, ahead = (build_loader(config([corpus], prefetch=n, **options), "train") for n in (0, 2))
    for one, two in zip(plain, ahead, strict=True):
        assert one.valid_tokens == two.valid_tokens
        for a, b in zip(one.micro_batches, two.micro_batches, strict=True):
            for name in ("tokens", "labels", "positions", "cu_seqlens"):
                assert torch.equal(getattr(a, name), getattr(b, name))


def test_a_micro_batch_is_its_samples(corpus: str) -> None:
    cfg = config([corpus], document_mask=True, reset_positions=True, mask_eos_loss=True)
    samples = build_samples(cfg.data, "train", 48, 16, cfg.data.seed)
    batch = next(build_loader(cfg, "train"))
    valid = 0
    for block, micro_batch in enumerate(batch.micro_batches):
        first, second = (samples.sample(2 * block + row) for row in range(2))
        for row, sample in enumerate((first, second)):
            assert micro_batch.tokens[row].tolist() == sample.tokens.tolist()
            labels = np.where(sample.tokens == EOS, -100, sample.labels)
            assert micro_batch.labels[row].tolist() == labels.tolist()
            assert micro_batch.positions is not None
            assert micro_batch.positions[row].tolist() == sample.positions.tolist()
            valid += int((labels != -100).sum())
        cuts = [*first.cu_seqlens[:-1].tolist(), *(16 + second.cu_seqlens).tolist()]
        assert micro_batch.cu_seqlens is not None
        assert micro_batch.cu_seqlens.tolist() == cuts
        assert (micro_batch.tokens.dtype, micro_batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert batch.valid_tokens == valid < 8 * 16


def test_what_is_not_asked_for_is_none(corpus: str) -> None:
    micro_batch = next(build_loader(config([corpus]), "train")).micro_batches[0]
    assert micro_batch.positions is None
    assert micro_batch.cu_seqlens is None


def test_validation_is_the_same_each_time_and_apart_from_training(tmp_path: Path) -> None:
    """Ids count up through the corpus, so the documents that a token is from can be told."""
    with IndexedWriter(tmp_path / "x", vocab_size=65_000) as writer:
        for i in range(100):
            writer.add_document(np.arange(50 * i, 50 * i + 50))
    cfg = config([str(tmp_path / "x")], split="80,20,0", steps=40)
    tokens = {
        split: torch.cat([m.tokens for batch in build_loader(cfg, split) for m in batch.micro_batches])
        for split in ("train", "valid")
    }
    assert int(tokens["train"].max()) < 80 * 50 <= int(tokens["valid"].min())
    loader = build_loader(cfg, "valid")
    assert len(loader) == 2
    first = [rows(batch) for batch in loader]
    loader.seek(0)
    assert [rows(batch) for batch in loader] == first


def test_data_of_its_own_for_validation(tmp_path: Path) -> None:
    train, valid = (write_corpus(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    cfg = config([train], valid=[valid])
    alone = config([valid], split="1,0,0", seed=cfg.data.seed)
    assert [rows(b) for b in build_loader(cfg, "valid")] == [rows(b) for b in build_loader(alone, "train")][:2]
    with pytest.raises(DataError, match="no test split"):
        build_loader(cfg, "test")


class TestBlends:
    @pytest.fixture
    def three(self, tmp_path: Path) -> list[str]:
        """Three datasets whose ids tell them apart: i * 100 to i * 100 + 99."""
        prefixes = []
        for i in range(3):
            with IndexedWriter(tmp_path / f"s{i}", vocab_size=1000) as writer:
                random = np.random.default_rng(i)
                for length in random.integers(5, 60, 40 + 20 * i).tolist():
                    writer.add_document(random.integers(100 * i, 100 * i + 100, length))
            prefixes.append(str(tmp_path / f"s{i}"))
        return prefixes

    @staticmethod
    def origins(cfg: Config) -> list[int]:
        return [row[0] // 100 for batch in build_loader(cfg, "train") for row in rows(batch)]

    def test_weighted(self, three: list[str]) -> None:
        sources = [{"prefix": p, "weight": w} for p, w in zip(three, (3, 5, 2), strict=True)]
        origins = self.origins(config(sources, steps=10, split="1,0,0"))
        assert origins[:20] == [1, 0, 2, 1, 0, 1, 2, 1, 0, 1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
        assert np.bincount(origins).tolist() == [24, 40, 16]

    def test_without_weights_every_sample_once_and_then_once_more(self, three: list[str]) -> None:
        one_pass = build_samples(config(three, split="1,0,0").data, "train", 1, 16, 0)
        size = len(one_pass)
        assert len({tuple(one_pass.sample(i).tokens.tolist()) for i in range(size)}) == size
        two = build_samples(config(three, split="1,0,0").data, "train", size + 1, 16, 0)
        assert len(two) == 2 * size

    def test_stages(self, three: list[str]) -> None:
        """Only s0 for 10 samples, then s1 and s2 in equal parts for 20, then all by weight."""
        weighted = [{"prefix": p, "weight": w} for p, w in zip(three, (1, 1, 2), strict=True)]
        stages = [
            {"until_tokens": 10 * 16, "train": [three[0]]},
            {"until_tokens": 30 * 16 - 5, "train": [{"prefix": p, "weight": 1} for p in three[1:]]},
            {"train": weighted},
        ]
        cfg = config([], stages=stages, steps=9, split="1,0,0")
        origins = self.origins(cfg)
        assert origins[:10] == [0] * 10
        assert np.bincount(origins[10:30]).tolist() == [0, 10, 10]
        assert np.bincount(origins[30:]).tolist() == [11, 10, 21]
        everything = [tuple(row) for batch in build_loader(cfg, "train") for row in rows(batch)]
        assert len(set(everything)) == len(everything)  # a later stage goes on where an earlier one left a source

    def test_stages_are_pure_too(self, three: list[str]) -> None:
        stages = [{"until_tokens": 17 * 16, "train": three[:2]}, {"train": [three[2]]}]
        cfg = config([], stages=stages, split="1,0,0")
        wanted = samples_in_order(cfg)
        for consumed in (8, 16, 24):
            batches = build_loader(cfg, "train", consumed_samples=consumed)
            assert [row for batch in batches for row in rows(batch)] == wanted[consumed:]


class TestErrors:
    @pytest.mark.parametrize(
        ("split", "data", "message"),
        [
            ("test", "969,30,1", r'test part of split "969,30,1" has 0 of 60 documents with 0 tokens.* 16 \+ 1|= 17'),
            ("valid", "59,1,0", r"valid part .* has 1 of 60 documents with \d+ tokens, but one sample takes"),
        ],
    )
    def test_a_split_shorter_than_a_sample(self, tmp_path: Path, split: str, data: str, message: str) -> None:
        prefix = write_corpus(tmp_path / "a", longest=10)
        with pytest.raises(DataError, match=message):
            build_loader(config([prefix], split=data), split)

    def test_missing_and_truncated_files(self, corpus: str) -> None:
        with pytest.raises(DataError, match=r"nowhere\.idx does not exist"):
            build_loader(config(["nowhere"]), "train")
        with open(f"{corpus}.bin", "r+b") as file:
            file.truncate(11)
        with pytest.raises(DataError, match="truncated"):
            build_loader(config([corpus]), "train")

    def test_a_sidecar_of_another_dataset(self, corpus: str, tmp_path: Path) -> None:
        other = write_corpus(tmp_path / "b", documents=61)
        Path(f"{other}.meta.json").rename(f"{corpus}.meta.json")
        with pytest.raises(DataError, match=r"describes 61 documents .* holds 60"):
            build_loader(config([corpus]), "train")

    def test_a_broken_sidecar(self, corpus: str) -> None:
        for content in ("{", "[]", '{"tokens": 3}'):
            Path(f"{corpus}.meta.json").write_text(content)
            with pytest.raises(DataError, match=r"meta\.json"):
                build_loader(config([corpus]), "train")

    def test_sources_of_different_tokenizers(self, tmp_path: Path) -> None:
        a, b = (write_corpus(tmp_path / name) for name in "ab")
        sidecar = read_sidecar(b)
        assert sidecar is not None
        write_sidecar(b, type(sidecar)(**{**vars(sidecar), "tokenizer_sha256": "cd" * 32}))
        with pytest.raises(DataError, match=r"different tokenizers \(sha256 abab.* and cdcd"):
            build_loader(config([a, b]), "train")
        with pytest.raises(DataError, match="different tokenizers"):
            build_loader(config([a], valid=[b]), "train")

    def test_another_tokenizer_than_the_data_s(self, corpus: str, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_text("{}")
        with pytest.raises(DataError, match=r"t\.json is not the tokenizer of .* \(sha256 44136fa"):
            build_loader(config([corpus], tokenizer=str(tmp_path / "t.json")), "train")
        with pytest.raises(DataError, match="cannot be read"):
            build_loader(config([corpus], tokenizer=str(tmp_path / "none.json")), "train")

    def test_without_sidecars_there_is_none(self, tmp_path: Path) -> None:
        cfg = config([write_corpus(tmp_path / "a", sidecar=False)])
        assert sidecar_of(cfg.data) is None
        assert len(list(build_loader(cfg, "train"))) == 6

    def test_batches_that_cannot_be_cut(self, corpus: str) -> None:
        with pytest.raises(DataError, match=r"8 is no multiple of .* 2 \* 3"):
            build_loader(config([corpus]), "train", 0, 3)
        with pytest.raises(ValueError, match="rank 2 of 2"):
            build_loader(config([corpus]), "train", 2, 2)

    def test_more_samples_than_there_are(self, corpus: str) -> None:
        samples = build_loader(config([corpus]), "train").samples
        with pytest.raises(DataError, match="asked of data that holds"):
            Loader(samples, micro=1, global_batch=1, size=len(samples) + 1)


class TestPrefetch:
    def test_an_error_comes_after_the_items_before_it(self) -> None:
        def source() -> Iterator[int]:
            yield from (1, 2)
            raise OSError("the disk is gone")

        items = Prefetch(source(), 3)
        assert [next(items), next(items)] == [1, 2]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(items)

    def test_it_runs_ahead_by_its_bound_and_no_further(self) -> None:
        made: list[int] = []
        reached = threading.Semaphore(0)

        def source() -> Iterator[int]:
            for i in range(100):
                made.append(i)
                reached.release()
                yield i

        items = Prefetch(source(), 3)
        for _ in range(3):
            assert reached.acquire(timeout=10)
        time.sleep(0.05)
        assert made == [0, 1, 2]
        assert next(items) == 0
        assert reached.acquire(timeout=10)
        items.close()
        assert made == [0, 1, 2, 3]
        with pytest.raises(StopIteration):
            next(items)

    def test_the_thread_ends_with_close_and_with_the_last_reference(self) -> None:
        def threads() -> int:
            return sum(thread.name == "prefetch" for thread in threading.enumerate())

        before = threads()
        items = Prefetch(iter(range(100)), 2)
        items.close()
        assert threads() == before
        kept = Prefetch(iter(range(100)), 2)
        thread = kept._thread
        del kept
        gc.collect()
        thread.join(10)
        assert not thread.is_alive()

    def test_errors_of_the_data_reach_the_training_loop(self, corpus: str) -> None:
        loader = build_loader(config([corpus], prefetch=2), "train")
        dataset = loader.samples
        assert isinstance(dataset, GPTDataset)
        dataset.index = dataset.index._replace(document=dataset.index.document + 10**6)
        with pytest.raises(IndexError):
            list(loader)

    def test_bad_bound(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            Prefetch(iter(()), 0)


class TestIndexCache:
    def test_a_second_run_maps_what_the_first_built(self, corpus: str, tmp_path: Path) -> None:
        cfg = config([corpus], index_cache=str(tmp_path / "cache"))
        first = [rows(batch) for batch in build_loader(cfg, "train")]
        (entry,) = (tmp_path / "cache").iterdir()
        stamp = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
        assert set(stamp) == {"document.npy", "sample.npy", "shuffle.npy"}
        assert [rows(batch) for batch in build_loader(cfg, "train")] == first
        assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == stamp

    def test_other_inputs_have_other_entries(self, corpus: str, tmp_path: Path) -> None:
        cache = str(tmp_path / "cache")
        base = {"index_cache": cache, "split": "1,0,0"}
        variants = [{}, {"seed": 5}, {"split": "9,1,0"}]
        for variant in variants:
            build_loader(config([corpus], **{**base, **variant}), "train")
        build_loader(config([corpus], seq=17, **base), "train")
        build_loader(config([corpus], steps=7, **base), "train")
        assert len(os.listdir(cache)) == 5

    def test_a_damaged_entry_is_built_anew(self, corpus: str, tmp_path: Path) -> None:
        cfg = config([corpus], index_cache=str(tmp_path / "cache"))
        first = [rows(batch) for batch in build_loader(cfg, "train")]
        for content in (b"", b"\x93NUMPY\x01\x00", b"nonsense"):
            (entry,) = (tmp_path / "cache").iterdir()
            (entry / "sample.npy").write_bytes(content)
            assert [rows(batch) for batch in build_loader(cfg, "train")] == first
        (entry,) = (tmp_path / "cache").iterdir()
        whole = (entry / "shuffle.npy").read_bytes()
        (entry / "shuffle.npy").write_bytes(whole[:-4])
        assert [rows(batch) for batch in build_loader(cfg, "train")] == first
        assert (entry / "shuffle.npy").read_bytes() == whole

    def test_many_build_at_once(self, tmp_path: Path) -> None:
        started = threading.Barrier(8)

        def build() -> list[np.ndarray]:
            started.wait()
            return [np.arange(1000), np.arange(3)]

        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(cached, tmp_path / "c", True, "key", ("a", "b"), build) for _ in range(8)]
            for job in jobs:
                a, b = job.result(30)
                assert a.tolist() == list(range(1000))
                assert b.tolist() == [0, 1, 2]
        assert sorted(os.listdir(tmp_path / "c")) == ["key"]

    def test_a_folder_that_cannot_be_written(self, corpus: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="cannot be written"):
            build_loader(config([corpus], index_cache=str(tmp_path / "file")), "train")
        (Path(corpus).parent / "index-cache").write_text("")
        with pytest.warns(UserWarning, match="built in memory"):
            assert len(list(build_loader(config([corpus]), "train"))) == 6


def test_the_training_path_imports_no_tokenizer() -> None:
    script = (
        "import sys, megapre.data.loader\n"
        "heavy = {'tokenizers', 'tiktoken', 'sentencepiece', 'pyarrow', 'rich', 'zstandard', 'transformers', 'regex'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_data_without_the_loader_needs_no_torch() -> None:
    script = "import sys, megapre.data, megapre.data.tokenize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
