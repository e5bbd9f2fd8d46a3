"""What data costs: the sample index, tokenizing, a random sample, a global batch.

    python benchmarks/data.py [--megabytes 400] [--documents 10000000] [--step-seconds S] [--only index,...]

Each part is set against something that it cannot do without, measured in the same run on the same machine:

- index: 10 million documents of 5 billion tokens, against the two NumPy shuffles that the format prescribes; and the
  peak memory of a process that does nothing else. Goal: at most 1.5 times, under 1 GB.
- tokenize: `megapre tokenize` from .jsonl to .bin, against tiktoken's bare encode of the same texts in memory, on one
  core; then with two workers. Goal: at least 0.7 of it, and 1.8 times as fast.
- sample: one random sample(i), against copying its tokens out of memory.
- batch: a global batch of the loader without prefetching, and its share of a training step where --step-seconds tells
  how long one takes. Goal: under 1%.

Prints a table and writes it with all numbers to benchmarks/results/data_<hardware>_<date>.{json,md}.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megapre.data import GPTDataset, IndexedDataset, IndexedWriter, build_blend, build_gpt_index, load_tokenizer
from megapre.data.documents import expand, parts_of, records
from megapre.data.host import host
from megapre.data.tokenize import run as tokenize
from megapre.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "examples" / "demo" / "corpus" / "train"
Row = dict[str, Any]


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The median time of some runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def row(name: str, value: float, unit: str, against: str = "", goal: str = "", met: bool | None = None) -> Row:
    """One line of the table."""
    return {"name": name, "value": value, "unit": unit, "against": against, "goal": goal, "met": met}


def index_in_this_process(documents: int, seq_length: int) -> dict[str, float]:
    """Times of the index and of its shuffles, taken in turn, and the peak memory of this process."""
    lengths = np.random.default_rng(0).geometric(1 / 500, documents).astype(np.int32)
    chosen = np.arange(documents, dtype=np.int32)
    tokens = int(lengths.sum(dtype=np.int64))
    samples = (tokens - 1) // seq_length

    def shuffles() -> None:
        random = np.random.RandomState(1234)
        random.shuffle(np.arange(documents, dtype=np.int32))
        random.shuffle(np.arange(samples, dtype=np.uint32))

    built, shuffled = [], []
    for _ in range(5):
        shuffled.append(seconds(shuffles))
        built.append(seconds(lambda: build_gpt_index(lengths, chosen, None, seq_length, 1234)))
    return {
        "documents": documents,
        "tokens": tokens,
        "samples": samples,
        "index_s": statistics.median(built),
        "shuffles_s": statistics.median(shuffled),
        "ratio": statistics.median(b / s for b, s in zip(built, shuffled, strict=True)),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def bench_index(documents: int) -> list[Row]:
    """The sample index, in C++ where it is built and in NumPy, each in a process of its own."""
    rows = []
    for form, native in (("C++", "auto"), ("NumPy", "0")):
        if native == "auto" and host() is None:
            print("megapre._host is not built: the index is measured in its NumPy form alone")
            continue
        script = f"import data, json; print(json.dumps(data.index_in_this_process({documents}, 1024)))"
        environment = {**os.environ, "MEGAPRE_NATIVE": native, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
        found = json.loads(subprocess.check_output([sys.executable, "-c", script], env=environment))
        what = f"index of {found['documents'] / 1e6:g}M documents, {found['tokens'] / 1e9:.2f}B tokens, {form}"
        ratio, peak = found["ratio"], found["peak_bytes"]
        goals = ("<= 1.5", "< 1 GB") if form == "C++" else ("", "")
        against = f"{found['shuffles_s']:.3f} s of NumPy shuffles"
        rows += [
            row(what, found["index_s"], "s", against),
            row("  ratio to its shuffles", ratio, "", "", goals[0], ratio <= 1.5 if goals[0] else None),
            row("  peak memory", peak / 1e9, "GB", "", goals[1], peak < 1e9 if goals[1] else None),
        ]
    size = 10_000_000
    blend = seconds(lambda: build_blend(range(1, 9), size))
    return [*rows, row(f"blend of 8 datasets, {size / 1e6:g}M samples", blend, "s")]


def texts_of(folder: Path) -> list[str]:
    """All documents of a folder's text files."""
    parts = (part for file in expand([folder]) for part in parts_of(file))
    return [record.text for part in parts for record in records(part, "text") if record.text]


def bench_tokenize(folder: Path, corpus: Path, megabytes: int) -> list[Row]:
    """From text to tokens, end to end, on one core and on two, against tiktoken on texts in memory."""
    texts = texts_of(corpus)
    once = sum(len(text.encode()) for text in texts)
    repeats = max(1, round(megabytes * 1e6 / once))
    size = repeats * once
    tokenizer = train_tokenizer([corpus], "bpe", 32_768, folder / "tokenizer.json")
    loaded = load_tokenizer(tokenizer.path)
    source = folder / "text.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for _ in range(repeats):
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    encoding = loaded._encoding  # type: ignore[attr-defined]  # tiktoken's own object: the bare rate

    def bare() -> None:
        for text in texts:
            encoding.encode_ordinary(text)

    bare_s = seconds(bare, 2) * repeats
    one = tokenize([source], folder / "one", tokenizer.path, workers=1, progress=False)
    two = tokenize([source], folder / "two", tokenizer.path, workers=2, progress=False)
    bare_s = (bare_s + seconds(bare, 2) * repeats) / 2  # before and after: the machine may not be alone
    speeds = [size / 1e6 / time for time in (bare_s, one.seconds, two.seconds)]
    share, scaling = bare_s / one.seconds, one.seconds / two.seconds
    return [
        row(f"tiktoken encode, {size / 1e6:.0f} MB of text in memory", speeds[0], "MB/s"),
        row("megapre tokenize, .jsonl to .bin, 1 worker", speeds[1], "MB/s"),
        row("  share of the bare rate", share, "", "", ">= 0.7", share >= 0.7),
        row("megapre tokenize, 2 workers", speeds[2], "MB/s"),
        row("  times as fast as 1", scaling, "", "", ">= 1.8", scaling >= 1.8),
    ]


def synthetic(folder: Path, tokens: int = 50_000_000) -> IndexedDataset:
    """A dataset of random tokens in documents of 500 on average."""
    random = np.random.default_rng(0)
    with IndexedWriter(folder / "synthetic", vocab_size=50_257) as writer:
        for length in random.geometric(1 / 500, tokens // 500).tolist():
            writer.add_document(random.integers(0, 50_257, length, np.uint16))
    return IndexedDataset(folder / "synthetic")


def bench_sample(dataset: IndexedDataset) -> list[Row]:
    """A random sample(i), files in the page cache."""
    rows, random = [], np.random.default_rng(1)
    for seq_length in (1024, 8192):
        index = build_gpt_index(dataset.lengths, np.arange(len(dataset)), None, seq_length, 1234)
        samples = GPTDataset(dataset, index, seq_length, eos_id=0)
        chosen: list[int] = random.integers(0, len(samples), 2000).tolist()
        line = np.zeros(seq_length * 2000, np.uint16)
        copies = [line[i * seq_length : (i + 1) * seq_length] for i in range(2000)]
        each = seconds(lambda read=samples.sample, chosen=chosen: [read(i) for i in chosen], 3) / 2000
        copy = seconds(lambda copies=copies: [part.astype(np.int64) for part in copies], 3) / 2000
        against = f"{copy * 1e6:.1f} µs to copy its tokens"
        rows.append(row(f"sample(i) of {seq_length} tokens", each * 1e6, "µs", against))
    return rows


def seconds_per_batch(
    dataset: IndexedDataset, micro: int, global_batch: int, seq_length: int, batches: int = 50
) -> float:
    """What a global batch costs its training step at most: made when it is asked for, by the thread that asks."""
    from megapre.data.loader import Loader

    index = build_gpt_index(dataset.lengths, np.arange(len(dataset)), None, seq_length, 1234)
    samples = GPTDataset(dataset, index, seq_length, eos_id=0)
    loader = Loader(samples, micro=micro, global_batch=global_batch, size=batches * global_batch)
    return seconds(lambda: list(loader)) / batches


def bench_batch(dataset: IndexedDataset, step_seconds: float | None) -> list[Row]:
    """A global batch of GPT-2 124M on the CPU (4 x 512 tokens), and one of half a million tokens."""
    rows = []
    for micro, global_batch, seq_length in ((4, 4, 512), (8, 512, 1024)):
        each = seconds_per_batch(dataset, micro, global_batch, seq_length)
        rate = global_batch * seq_length / each / 1e6
        name = f"global batch of {global_batch} x {seq_length} tokens"
        rows.append(row(name, each * 1e3, "ms", f"{rate:.0f}M tokens/s"))
        if step_seconds is not None and global_batch == 4:
            share = 100 * each / step_seconds
            rows.append(row("  share of a training step", share, "%", f"{step_seconds:g} s a step", "< 1%", share < 1))
    return rows


def hardware() -> str:
    """The processor in a word, and how many of it: part of the result's name."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1]
            break
    word = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)|cpu|@.*", "", model.lower())).strip("-")
    return f"{word}-{len(os.sched_getaffinity(0))}core"


def write_results(rows: list[Row], command: str) -> Path:
    """The table as JSON and Markdown."""
    name = f"data_{hardware()}_{datetime.date.today().isoformat()}"
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    about = {"command": command, "hardware": hardware(), "python": platform.python_version(), "numpy": np.__version__}
    result = {**about, "load_average": load, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [f"# {name}", "", f"`{command}`, load average at the end {load:.1f}", ""]
    lines += ["| what | value | against | goal | met |", "|---|--:|---|---|---|"]
    lines += [f"| {r['name'].strip()} | {shown(r)} | {r['against']} | {r['goal']} | {met(r)} |" for r in rows]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def shown(r: Row) -> str:
    """The value of a row with its unit."""
    return f"{r['value']:.3g} {r['unit']}".strip()


def met(r: Row) -> str:
    """Whether a row met its goal, in a word; nothing without a goal."""
    return {True: "yes", False: "NO", None: ""}[r["met"]]


def main() -> int:
    """Run the parts that were asked for. 1 where a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400, help="of text to tokenize")
    parser.add_argument("--documents", type=int, default=10_000_000, help="of the sample index")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of text files to tokenize, over and over")
    parser.add_argument("--step-seconds", type=float, help="of a training step of 4 x 512 tokens on this machine")
    parser.add_argument("--only", default="index,tokenize,sample,batch", help="parts, with commas between them")
    asked = parser.parse_args()
    parts, rows = asked.only.split(","), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "index" in parts:
            rows += bench_index(asked.documents)
        if "tokenize" in parts:
            rows += bench_tokenize(folder, asked.corpus, asked.megabytes)
        if "sample" in parts or "batch" in parts:
            dataset = synthetic(folder)
            rows += bench_sample(dataset) if "sample" in parts else []
            rows += bench_batch(dataset, asked.step_seconds) if "batch" in parts else []
    width = max(len(r["name"]) for r in rows)
    for r in rows:
        goal = f"goal {r['goal']}: {met(r)}" if r["goal"] else ""
        print(f"{r['name']:{width}}  {shown(r):>12}  {r['against']:30}  {goal}".rstrip())
    print(f"written to {write_results(rows, ' '.join(['python', *sys.argv]))}.{{json,md}}")
    return int(any(r["met"] is False for r in rows))


if __name__ == "__main__":
    sys.exit(main())
