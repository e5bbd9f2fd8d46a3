"""What is done with a trained model: evaluation, sampling, benchmark."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megapre.config import Config
from megapre.data import IndexedDataset, load_tokenizer, read_sidecar, split_ranges
from megapre.train import bench, evaluate, loop, sample
from megapre.train.evaluate import load_model
from megapre.train.folder import open_run

Tiny = Callable[..., Config]


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    assert loop.run(tiny("run.steps=60", "optim.warmup_steps=5")) == 0
    capfd.readouterr()
    return tmp_path / "run"


def stream_loss(run: Path, tokens: torch.Tensor) -> tuple[float, int]:
    """Loss over a stream, window by window, with plain logits: what `evaluate` must compute."""
    cfg = open_run(run)
    model, _ = load_model(run, cfg, torch.device("cpu"))
    total, count, length = 0.0, 0, cfg.batch.seq_length
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            window = tokens[start : start + length + 1]
            logits = model(window[:-1].unsqueeze(0))[0]
            total += torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum").item()
            count += len(window) - 1
    return total, count


def test_every_token_of_a_dataset_is_predicted_once(trained: Path, corpus: Path) -> None:
    (found,) = evaluate.run(trained, str(corpus), device="cpu")
    data, sidecar = IndexedDataset(corpus), read_sidecar(corpus)
    assert sidecar is not None
    tokens = torch.tensor([int(t) for i in range(len(data)) for t in data.get(i)])
    total, count = stream_loss(trained, tokens)
    assert found.tokens == count == sidecar.tokens - 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * sidecar.tokens / sidecar.bytes)
    assert 0 < found.bits_per_byte < math.log2(360), "worse than guessing"


def test_the_runs_own_validation_documents_are_the_default(
    trained: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (found,) = evaluate.run(trained, device="cpu")
    data = IndexedDataset(corpus)
    first, last = split_ranges("8,2,0", len(data))["valid"]
    tokens = torch.tensor([int(t) for i in range(first, last) for t in data.get(i)])
    total, count = stream_loss(trained, tokens)
    assert 0 < first < last == len(data)
    assert found.tokens == count and found.loss == pytest.approx(total / count, rel=1e-5)
    assert f"{found.loss:.4f}" in capfd.readouterr().out


def test_a_limited_evaluation_takes_the_first_micro_batches(trained: Path, corpus: Path) -> None:
    (found,) = evaluate.run(trained, str(corpus), batches=3, device="cpu")
    assert found.tokens == 3 * 2 * 64


def test_samples_need_the_run_folder_alone(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(trained, moved)
    shutil.rmtree(trained)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (text,) = sample.run("model", "the captain", max_new_tokens=20, temperature=0.7, seed=3, device="cpu")
    assert text.startswith("the captain") and len(text) > len("the captain")
    assert capfd.readouterr().out == text + "\n"
    assert sample.run("model", "the captain", max_new_tokens=20, temperature=0.7, seed=3, device="cpu") == [text]


def test_several_samples_differ_by_their_seeds(trained: Path) -> None:
    two = sample.run(trained, "the", max_new_tokens=20, temperature=1.5, seed=1, num_samples=2, device="cpu")
    second = sample.run(trained, "the", max_new_tokens=20, temperature=1.5, seed=2, device="cpu")
    assert two[0] != two[1] == second[0]


def test_an_empty_prompt_begins_a_document_and_a_long_wish_is_cut_to_the_context(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (text,) = sample.run(trained, "", max_new_tokens=10_000, temperature=0, device="cpu")
    assert text
    assert "exceed the context of 64" in capfd.readouterr().err


def test_explain_tells_the_ten_likeliest_with_their_probabilities(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sample.run(trained, "the miller", max_new_tokens=2, temperature=0, explain=True, device="cpu")
    out = capfd.readouterr().out
    rows = [line.split("│")[1:4] for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 20
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    model, _ = load_model(trained, open_run(trained), torch.device("cpu"))
    with torch.no_grad():
        odds = model(torch.tensor([tokenizer.encode("the miller")]))[0, -1].double().softmax(-1)
    best = odds.topk(10)
    assert [int(token) for token, _, _ in rows[:10]] == best.indices.tolist()
    assert [float(p) for _, _, p in rows[:10]] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_text_streams_by_whole_characters(trained: Path) -> None:
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    pieces = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    stream = sample.Utf8Stream(tokenizer)
    assert [stream.add(pieces[byte]) for byte in (b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac")] == [
        "",
        "é",
        "",
        "",
        "€",
    ]
    assert stream.end() == ""
    stream.add(pieces[b"\xe2"])
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_bench_times_the_real_step(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for real in (True, False):
        cfg = tiny() if real else tiny("data.train=[]", "model.vocab=300")
        found = bench.step(cfg, steps=3, warmup=1, json_path=tmp_path / "bench.json")
        assert json.loads((tmp_path / "bench.json").read_text()) == found
        assert found["tokens"] == ("data" if real else "made up")
        assert 0 < found["step_s"]["p20"] <= found["step_s"]["p50"] <= found["step_s"]["p80"]
        assert found["tokens_per_s"] == pytest.approx(4 * 64 / found["step_s"]["p50"])
        assert found["mfu"] is None and found["peak_memory_bytes"] > 2**20
        assert "tok/s" in capfd.readouterr().out
    assert not (tmp_path / "run").exists(), "a benchmark leaves no run folder"
