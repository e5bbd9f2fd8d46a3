"""What the order of a run's samples depends on, besides the config: kept in checkpoints, compared on resume.

The order of a source is a function of its documents' lengths, seed, sequence length, the number of epochs, and whether
the last epoch is shuffled apart (gpt_index.py); the latter two follow from how many samples the run plans. A blend by
weights looks back only (blend.py); one of all samples depends on its number of passes, which is that of the epochs.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .dataset import Blend, GPTDataset
from .errors import DataError
from .indexed import IndexedDataset, bare_prefix
from .sidecar import read_sidecar
from .sources import build_samples

if TYPE_CHECKING:
    from ..config import Config


@dataclass(frozen=True)
class SourceFacts:
    """Which data a source is. `tokenizer_sha256` is "" where no sidecar tells it."""

    prefix: str
    documents: int
    tokens: int
    tokenizer_sha256: str

    def __str__(self) -> str:
        made = f", tokenizer {self.tokenizer_sha256[:12]}" if self.tokenizer_sha256 else ""
        return f"{self.prefix} ({self.documents:,} documents, {self.tokens:,} tokens{made})"


def order_facts(cfg: "Config") -> dict[str, Any]:
    """JSON values for a checkpoint: `samples` planned for the whole run, and the `sources` it trains on, in order."""
    return {"samples": planned_samples(cfg), "sources": [asdict(source) for source in _sources(cfg)]}


def planned_samples(cfg: "Config") -> int:
    return cfg.batch.global_ * cfg.run.steps


def compare_order(before: dict[str, Any], cfg: "Config", reorder: bool = False) -> None:
    """Raises DataError unless `cfg` gives the samples of the run that wrote `before` and, unless `reorder`, in the same
    order.

    A dataset may have moved. Where another number of samples is planned, the index of both is built and compared.
    """
    then, now = [SourceFacts(**source) for source in before["sources"]], _sources(cfg)
    for old, new in zip(then, now, strict=False):
        if (old.documents, old.tokens, old.tokenizer_sha256) != (new.documents, new.tokens, new.tokenizer_sha256):
            raise DataError(f"it was trained on {old}, but now reads {new}; give it the data it began with")
    if len(then) != len(now):
        raise DataError(f"it was trained on {len(then)} sources, but now reads {len(now)}; give it those it began with")
    planned = before["samples"]
    if reorder or planned == planned_samples(cfg):
        return
    first, second = _parts(cfg, planned), _parts(cfg, planned_samples(cfg))
    for prefix in sorted(first.keys() & second.keys()):
        old_index, new_index = first[prefix].index, second[prefix].index
        pairs = ((old_index.document, new_index.document), (old_index.shuffle, new_index.shuffle))
        if not all(np.array_equal(one, other) for one, other in pairs):
            steps = planned // cfg.batch.global_
            epochs = [len(index.document) // len(np.unique(index.document)) for index in (old_index, new_index)]
            raise DataError(
                f"run.steps = {steps} planned {epochs[0]} epochs of {prefix}, run.steps = {cfg.run.steps} plans "
                f"{epochs[1]}, and epochs are shuffled together, so its samples would come in another order; keep "
                f"run.steps = {steps}, choose a number of steps that needs just as much of each source, or resume with "
                f"--reorder-data if that is meant"
            )


def _parts(cfg: "Config", planned: int) -> dict[str, GPTDataset]:
    """The datasets behind `planned` training samples, by prefix."""
    samples = build_samples(cfg.data, "train", planned, cfg.batch.seq_length, seed=cfg.data.seed)
    datasets = samples.datasets if isinstance(samples, Blend) else (samples,)
    return {str(dataset.dataset.prefix): dataset for dataset in datasets if isinstance(dataset, GPTDataset)}


def _sources(cfg: "Config") -> list[SourceFacts]:
    named = [*cfg.data.train, *(source for stage in cfg.data.stages for source in stage.train)]
    facts = []
    for prefix in dict.fromkeys(bare_prefix(source.prefix) for source in named):
        dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
        sha256 = sidecar.tokenizer_sha256 if sidecar else ""
        facts.append(SourceFacts(prefix, dataset.documents, dataset.tokens, sha256))
    return facts
