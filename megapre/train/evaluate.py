"""How well a model predicts text it was not trained on.

loss is the mean over all predicted tokens of -ln p(token | what came before it in its window), in nats. Perplexity is
exp(loss). Bits per byte divide by the text's length in UTF-8 bytes instead, loss / ln 2 * tokens / bytes, which does
not depend on the tokenizer.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from megapre import checkpoint
from megapre.checkpoint.state import model_tensors
from megapre.data import DataError, GPTDataset, GPTIndex, IndexedDataset, Loader, read_sidecar, split_ranges
from megapre.data.gpt_index import build_sample_index

from . import machine
from .fixed import Inputs
from .folder import TOKENIZERS, RunFolderError, open_run
from .stage import build_model, check_tokens

if TYPE_CHECKING:
    from megapre.config import Config, Source
    from megapre.data import GlobalBatch
    from megapre.model.transformer import Transformer

    from .step import Engine


class Validation(NamedTuple):
    """Mean loss in nats over so many predicted tokens."""

    loss: float
    tokens: int


class Evaluation(NamedTuple):
    """What `megapre eval` prints of one dataset. `bits_per_byte` is None where no sidecar tells the text's bytes."""

    data: str
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None


@torch.no_grad()
def mean_loss(model: Transformer, batches: Iterable[GlobalBatch], device: torch.device) -> Validation:
    """Mean loss over all valid tokens of `batches`; the host waits for the device once, at the end.

    Raises DataError for a token outside the model's vocabulary.
    """
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        check_tokens(batch, model.cfg.vocab)
        for part in batch.micro_batches:
            total += model.loss(*Inputs.of(part).to(device))
        tokens += batch.valid_tokens
    return Validation(float(total) / max(tokens, 1), tokens)


def validate(engine: Engine, loader: Loader) -> Validation:
    """The validation of a run: the same batches each time, the loader's from its beginning; on every rank the same."""
    loader.seek(0)
    total, tokens = torch.zeros(2, dtype=torch.float64, device=engine.device).unbind()
    with loader:
        for batch in loader:
            loss, counted = engine.evaluate(batch)
            total += loss
            tokens += counted
    return Validation(float(total) / max(float(tokens), 1), int(tokens))


def run(run_dir: str | Path, data: str = "", batches: int = 0, device: str = "auto") -> list[Evaluation]:
    """Evaluates a run's newest whole checkpoint: on every token of the dataset `data` (a prefix), or of the run's own
    validation data. `batches` > 0: on that many micro-batches only. Prints a table, and returns its rows.

    Raises RunFolderError, CheckpointError and DataError.
    """
    path = Path(run_dir)
    cfg = open_run(path)
    cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"device": device})})
    place = machine.prepare(cfg.run)
    chosen = _chosen(cfg, data)
    for prefix, _ in chosen:
        _same_tokenizer(path, prefix)
    model, manifest = load_model(path, cfg, place)
    rows = []
    for prefix, documents in chosen:
        samples = in_order(prefix, documents, cfg)
        found = mean_loss(model, _batches(samples, cfg, batches), place)
        rows.append(_evaluation(prefix, found))
    _print(rows, f"{path}, step {manifest.step}")
    return rows


def load_model(path: Path, cfg: Config, device: torch.device) -> tuple[Transformer, checkpoint.Manifest]:
    """The model of a run folder with the weights of its newest whole checkpoint."""
    manifest = checkpoint.newest_verified(path / "checkpoints", lambda problem: print(problem, file=sys.stderr))
    if manifest is None:
        raise RunFolderError(f"run folder {path} holds no checkpoint yet")
    model = build_model(cfg, device)
    checkpoint.load(manifest, model_tensors(model))
    return model.eval(), manifest


def in_order(prefix: str, documents: tuple[int, int] | None, cfg: Config) -> GPTDataset:
    """The documents [first, last) of a dataset (None: all), laid end to end unshuffled and cut into windows.

    Every token but the first is predicted exactly once; the last window is padded.
    """
    dataset = IndexedDataset(prefix)
    first, last = documents or (0, len(dataset))
    document = np.arange(first, last, dtype=np.int32)
    tokens = int(dataset.lengths[first:last].sum(dtype=np.int64))
    seq_length = cfg.batch.seq_length
    windows = max(-(-(tokens - 1) // seq_length), 0)
    sample = build_sample_index(dataset.lengths, document, windows, seq_length, 1, np.dtype(np.int64))
    sidecar = read_sidecar(prefix)
    return GPTDataset(
        dataset,
        GPTIndex(document, sample, np.arange(windows)),
        seq_length,
        eos_id=sidecar.eos_id if sidecar else None,
        mask_eos_loss=cfg.data.mask_eos_loss,
    )


def _batches(samples: GPTDataset, cfg: Config, limit: int) -> Iterable[GlobalBatch]:
    """Batches of batch.micro windows, and the windows left over one by one."""
    micro = cfg.batch.micro
    size = min(len(samples), limit * micro) if limit else len(samples)
    whole = size // micro * micro
    for count, begin, end in ((micro, 0, whole), (1, whole, size)):
        with Loader(
            samples,
            micro=count,
            global_batch=count,
            size=end,
            consumed_samples=begin,
            positions=cfg.data.reset_positions,
            cu_seqlens=cfg.data.document_mask,
            prefetch=cfg.data.prefetch,
        ) as loader:
            yield from loader


def _chosen(cfg: Config, data: str) -> list[tuple[str, tuple[int, int] | None]]:
    """Datasets and their documents: the one asked for, else the run's validation sources, else the split of train."""
    if data:
        return [(data, None)]
    if cfg.data.valid:
        return [(source.prefix, None) for source in cfg.data.valid]
    sources: list[Source] = [*cfg.data.train, *(source for stage in cfg.data.stages for source in stage.train)]
    prefixes = dict.fromkeys(source.prefix for source in sources)
    return [(prefix, split_ranges(cfg.data.split, len(IndexedDataset(prefix)))["valid"]) for prefix in prefixes]


def _same_tokenizer(run_dir: Path, prefix: str) -> None:
    """Raises DataError where both the run and the dataset name their tokenizer, and it is not the same one."""
    sidecar = read_sidecar(prefix)
    file = next((file for name in TOKENIZERS if (file := run_dir / name).is_file()), None)
    if sidecar is None or file is None:
        return
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    if own != sidecar.tokenizer_sha256:
        raise DataError(
            f"{prefix} was tokenized with another tokenizer than the run {run_dir} (sha256 "
            f"{sidecar.tokenizer_sha256[:12]} and {own[:12]}): its ids mean other text to this model; tokenize the "
            f"text anew with {file}"
        )


def _evaluation(prefix: str, found: Validation) -> Evaluation:
    sidecar = read_sidecar(prefix)
    bits = None
    if sidecar is not None and sidecar.bytes:
        bits = found.loss / math.log(2) * sidecar.tokens / sidecar.bytes
    return Evaluation(prefix, found.tokens, found.loss, math.exp(min(found.loss, 700.0)), bits)


def _print(rows: list[Evaluation], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("data", "tokens", "loss", "perplexity", "bits per byte", title=title, title_justify="left")
    for row in rows:
        bits = "n/a" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        table.add_row(row.data, f"{row.tokens:,}", f"{row.loss:.4f}", f"{row.perplexity:.2f}", bits)
    Console().print(table)
