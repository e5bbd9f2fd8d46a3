"""Settles what a config leaves to its data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from megapre.data import DataError, IndexedDataset, read_sidecar, sidecar_of, tokenizer_path, with_vocab_of_data

if TYPE_CHECKING:
    from megapre.config import Config


def settle(cfg: Config) -> tuple[Config, Path | None]:
    """The config with its vocabulary known, and the file of the tokenizer (None where nothing names one).

    The vocabulary is that of the data's sidecars. Raises DataError where data and model do not fit.
    """
    prefixes = data_prefixes(cfg)
    if not prefixes:
        raise DataError(
            'no data is named; set data.train to the prefix of a .bin and .idx, as in data.train=["corpus"]'
        )
    for prefix in prefixes:
        IndexedDataset(prefix)  # missing, truncated or foreign files are told before anything else
    sidecar = sidecar_of(cfg.data)
    cfg = with_vocab_of_data(cfg)
    if cfg.model.vocab == 0:
        raise DataError(
            f"model.vocab = 0 takes the vocabulary from the data, but {prefixes[0]} has no sidecar "
            f"({prefixes[0]}.meta.json); set model.vocab"
        )
    if sidecar is not None and cfg.model.vocab < sidecar.vocab_size:
        raise DataError(
            f"model.vocab = {cfg.model.vocab} is smaller than the vocabulary of {sidecar.vocab_size} tokens that "
            f"{prefixes[0]} was written with; set model.vocab to 0 (take it from the data) or to at least "
            f"{sidecar.vocab_size}"
        )
    if cfg.data.tokenizer:
        return cfg, Path(cfg.data.tokenizer)
    return cfg, next((path for prefix in prefixes if (path := _named_tokenizer(prefix)) is not None), None)


def _named_tokenizer(prefix: str) -> Path | None:
    """The tokenizer file that a dataset's sidecar names; None where it names none or the file is gone.

    Raises DataError where the file is not the one that the dataset was made with.
    """
    path, sidecar = tokenizer_path(prefix), read_sidecar(prefix)
    if path is None or sidecar is None or not path.is_file():
        return None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sidecar.tokenizer_sha256:
        raise DataError(
            f"{path} is not the tokenizer that {prefix} was made with (sha256 {found[:12]} and "
            f"{sidecar.tokenizer_sha256[:12]}); put the right one there or name it as data.tokenizer"
        )
    return path


def data_prefixes(cfg: Config) -> list[str]:
    """Every dataset a run reads, each once."""
    sources = [*cfg.data.train, *(source for stage in cfg.data.stages for source in stage.train), *cfg.data.valid]
    return list(dict.fromkeys(source.prefix for source in sources))
