"""From the data section of a run to its samples: which files, which documents of them, in which proportions.

Sources without weights are blended exhaustively: each of their samples once an epoch, where several epochs
are shuffled together as Megatron does: a sample may come again before all others came. Sources with weights are
blended by these. Stages change the blend at given numbers of consumed tokens; a source that several stages
name goes on where the stage before left it, so that no stage begins it again.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .blend import BlendIndex, build_blend, build_exhaustive_blend, normalize, requests
from .dataset import Blend, GPTDataset, Samples
from .errors import DataError
from .gpt_index import GPTIndex, build_gpt_index, split_ranges
from .index_cache import cached, digest
from .indexed import IndexedDataset, bare_prefix
from .sidecar import Sidecar, read_sidecar

if TYPE_CHECKING:
    from ..config.schema import Config, Data, Source

CACHE = "index-cache"  # folder beside the data, unless data.index_cache names another


class Mixture(NamedTuple):
    """The sources of one stage: prefixes, and their weights or None for an exhaustive blend."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class Reading:
    """How samples are cut from any source. `cache` None: beside each source's files."""

    seq_length: int
    seed: int
    split: str = "1,0,0"
    part: str = "train"  # which part of `split`
    eos_id: int | None = None
    mask_eos_loss: bool = False
    cache: Path | None = None

    def documents(self, dataset: IndexedDataset) -> tuple[int, int]:
        """The range of sequences of a dataset that belong to the split's part; DataError if not one sample long."""
        low, high = split_ranges(self.split, len(dataset))[self.part]
        tokens = int(dataset.lengths[low:high].sum(dtype=np.int64))
        if tokens <= self.seq_length:
            one = "" if len(dataset) > 1 else "; `megapre tokenize --separator` cuts a .txt file into documents"
            raise DataError(
                f'{dataset.prefix}: the {self.part} part of split "{self.split}" has {high - low:,} of '
                f"{len(dataset):,} documents with {tokens:,} tokens, but one sample takes seq_length + 1 = "
                f"{self.seq_length + 1:,}; change data.split, shorten batch.seq_length, or add text{one}"
            )
        return low, high

    def dataset(self, source: IndexedDataset, samples: int | None) -> GPTDataset:
        """At least `samples` samples of a source, or one epoch of it."""
        low, high = self.documents(source)
        key = digest("gpt", source.lengths[low:high], low, samples, self.seq_length, self.seed)

        def build() -> GPTIndex:
            documents = np.arange(low, high, dtype=np.int32)
            return build_gpt_index(source.lengths, documents, samples, self.seq_length, self.seed)

        folder = self.cache or Path(source.prefix).parent / CACHE
        index = GPTIndex(*cached(folder, self.cache is not None, key, GPTIndex._fields, build))
        return GPTDataset(source, index, self.seq_length, eos_id=self.eos_id, mask_eos_loss=self.mask_eos_loss)


def build_samples(data: "Data", split: str, size: int, seq_length: int, seed: int) -> Samples:
    """At least `size` samples of `split` ("train", "valid" or "test") of a run's data.

    Where data.valid is set, it is the whole of "valid", data.train is the whole of "train", and there is no "test";
    else all three are parts of data.train by data.split. With stages, "valid" and "test" are parts of the last stage's
    blend.
    """
    stages = [(stage.until_tokens, _mixture(stage.train)) for stage in data.stages] or [(0, _mixture(data.train))]
    whole = bool(data.valid)
    if whole and split == "test":
        raise DataError("data.valid is set, so data.split is not used and there is no test split")
    if split != "train":
        stages = [(0, _mixture(data.valid) if whole else stages[-1][1])]
    sidecar = sidecar_of(data)
    reading = Reading(
        seq_length=seq_length,
        seed=seed,
        split="1,0,0" if whole else data.split,
        part="train" if whole else split,
        eos_id=sidecar.eos_id if sidecar else None,
        mask_eos_loss=data.mask_eos_loss,
        cache=Path(data.index_cache) if data.index_cache else None,
    )
    if len(stages) == 1:
        return blended(stages[0][1], size, reading)
    return staged(stages, size, reading)


def blended(mixture: Mixture, size: int, reading: Reading) -> Samples:
    """At least `size` samples of a mixture, equal to Megatron's for one source, weights, and one exhaustive pass."""
    sources = [_open(prefix) for prefix in mixture.prefixes]
    if len(sources) == 1:
        return reading.dataset(sources[0], size)
    if mixture.weights is not None:
        asked = requests(mixture.weights, size)
        datasets = [reading.dataset(source, count) for source, count in zip(sources, asked, strict=True)]
        return Blend(datasets, _blend_index(mixture, size, reading, ()), mixture.prefixes)
    datasets = [reading.dataset(source, None) for source in sources]
    sizes = [len(dataset) for dataset in datasets]
    passes = -(-size // sum(sizes))
    if passes > 1:
        sizes = [passes * count for count in sizes]
        datasets = [reading.dataset(source, count) for source, count in zip(sources, sizes, strict=True)]
    return Blend(datasets, _blend_index(mixture, sum(sizes), reading, tuple(sizes)), mixture.prefixes)


def staged(stages: Sequence[tuple[int, Mixture]], size: int, reading: Reading) -> Samples:
    """`size` samples whose mixture changes where the given numbers of tokens are consumed; the last one stays.

    A boundary within a sample is moved to that sample's end.
    """
    prefixes = list(dict.fromkeys(prefix for _, mixture in stages for prefix in mixture.prefixes))
    sources = [_open(prefix) for prefix in prefixes]
    asked = [0] * len(prefixes)  # of each source, with the surplus
    given = np.zeros(len(prefixes), np.int64)  # of each source by the stages before
    parts: list[BlendIndex] = []
    start = 0
    for number, (until_tokens, mixture) in enumerate(stages):
        until = size if number == len(stages) - 1 else min(size, -(-until_tokens // reading.seq_length))
        if until <= start:
            continue
        places = [prefixes.index(prefix) for prefix in mixture.prefixes]
        if mixture.weights is None:  # in proportion to their tokens, as an exhaustive blend would be
            held = [sources[place].lengths[slice(*reading.documents(sources[place]))] for place in places]
            mixture = mixture._replace(weights=tuple(float(lengths.sum(dtype=np.int64)) for lengths in held))
        index = _blend_index(mixture, until - start, reading, ())
        for place, count in zip(places, requests(mixture.weights or (), until - start), strict=True):
            asked[place] += count
        lookup = np.array(places, np.int16)
        parts.append(BlendIndex(lookup[index.dataset], index.sample + given[places][index.dataset]))
        given[places] += np.bincount(index.dataset, minlength=len(places))
        start = until
    used = [place for place, count in enumerate(asked) if count]
    datasets = [reading.dataset(sources[place], asked[place]) for place in used]
    renumber = np.zeros(len(prefixes), np.int16)
    renumber[used] = np.arange(len(used))
    whole = BlendIndex(
        renumber[np.concatenate([part.dataset for part in parts])], np.concatenate([part.sample for part in parts])
    )
    return Blend(datasets, whole, [prefixes[place] for place in used])


def _open(prefix: str) -> IndexedDataset:
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    if sidecar is not None and (sidecar.documents, sidecar.tokens) != (dataset.documents, dataset.tokens):
        raise DataError(
            f"{prefix}.meta.json describes {sidecar.documents:,} documents of {sidecar.tokens:,} tokens, but the "
            f".idx holds {dataset.documents:,} of {dataset.tokens:,}: they are not of the same dataset"
        )
    return dataset


def _blend_index(mixture: Mixture, size: int, reading: Reading, sizes: tuple[int, ...]) -> BlendIndex:
    """The weighted blend of `size` samples, or the exhaustive one of `sizes`, through the cache."""
    weights = mixture.weights
    folder = reading.cache or Path(mixture.prefixes[0]).parent / CACHE
    key = digest("blend", None if sizes else normalize(weights or ()), size, sizes)

    def build() -> BlendIndex:
        return build_exhaustive_blend(sizes) if sizes else build_blend(weights or (), size)

    return BlendIndex(*cached(folder, reading.cache is not None, key, BlendIndex._fields, build))


def _mixture(sources: "Sequence[Source]") -> Mixture:
    prefixes = tuple(bare_prefix(source.prefix) for source in sources)
    weights = [source.weight for source in sources]
    if not prefixes:
        raise DataError("no data is named; set data.train to the prefix of a .bin and .idx, without the ending")
    # The configuration has seen to it that all have a weight, or none.
    return Mixture(prefixes, None if weights[0] is None else tuple(float(weight or 0) for weight in weights))


def sidecar_of(data: "Data") -> Sidecar | None:
    """The sidecar that the sources of a run agree on; None where none has one.

    Raises DataError where two sources, or a source and data.tokenizer, were made with different tokenizers.
    """
    named = [*data.train, *data.valid, *(source for stage in data.stages for source in stage.train)]
    found: dict[str, Sidecar] = {}
    for source in named:
        prefix = bare_prefix(source.prefix)
        if (sidecar := read_sidecar(prefix)) is not None:
            found[prefix] = sidecar
    for prefix, sidecar in found.items():
        first, chosen = next(iter(found.items()))
        if sidecar.tokenizer_sha256 != chosen.tokenizer_sha256:
            raise DataError(
                f"{first} and {prefix} were tokenized with different tokenizers "
                f"(sha256 {chosen.tokenizer_sha256[:12]} and {sidecar.tokenizer_sha256[:12]}); tokenize one anew"
            )
        if data.tokenizer and sidecar.tokenizer_sha256 != (given := _sha256(data.tokenizer)):
            raise DataError(
                f"data.tokenizer {data.tokenizer} is not the tokenizer of {prefix} (sha256 {given[:12]} and "
                f"{sidecar.tokenizer_sha256[:12]}); leave it out or tokenize the data anew"
            )
    return next(iter(found.values()), None)


def with_vocab_of_data(cfg: "Config") -> "Config":
    """`cfg` with the vocabulary of its data, where the model leaves it to them and they have a sidecar.

    Raises DataError as `sidecar_of` does, ConfigError where a rule then breaks.
    """
    sidecar = None if cfg.model.vocab else sidecar_of(cfg.data)
    return cfg if sidecar is None else cfg.with_vocab(sidecar.vocab_size)


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data.tokenizer {path} cannot be read: {error.strerror}") from error


def tokenizer_path(prefix: str) -> Path | None:
    """The tokenizer that a dataset's sidecar names; None where there is no sidecar."""
    sidecar = read_sidecar(prefix)
    return None if sidecar is None else Path(os.path.dirname(bare_prefix(prefix))) / sidecar.tokenizer
