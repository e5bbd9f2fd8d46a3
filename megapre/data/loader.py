"""Global batches for one data-parallel rank.

Batches are blocks of consecutive samples: a micro-batch of all ranks is micro * dp_size samples from where the last
ended, and rank r takes [r * micro, (r + 1) * micro) of them. Hence the samples of a step do not depend on the number of
ranks, and `consumed_samples` is the loader's whole state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from .dataset import IGNORE, Sample, Samples
from .errors import DataError
from .prefetch import Prefetch
from .sources import build_samples

if TYPE_CHECKING:
    from ..config import Config


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B sequences of S tokens, on the CPU.

    tokens: int64 [B, S]; labels: int64 [B, S], -100 where there is no loss; positions: int64 [B, S], or None for
    0..S-1; cu_seqlens: int32 [documents + 1] over the B * S tokens in a row, or None where attention may cross
    documents.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None
    cu_seqlens: Tensor | None


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One rank's share of a step: its micro-batches, its labels with a loss, and the samples of all ranks together."""

    micro_batches: tuple[MicroBatch, ...]
    valid_tokens: int
    samples: int


class Loader:
    """Iterates over the global batches from `consumed_samples` on; a batch counts as consumed once it was handed out.

    `size` bounds the samples; a last batch that it does not fill is left out. With `prefetch` > 0 a thread keeps so
    many batches ready, and an error in it is raised where the batch is asked for. `close` (or a `with` block) ends the
    thread.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        micro: int,
        global_batch: int,
        size: int | None = None,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed_samples: int = 0,
        positions: bool = False,
        cu_seqlens: bool = False,
        prefetch: int = 0,
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} of {dp_size}")
        if micro < 1 or global_batch < 1 or global_batch % (micro * dp_size):
            raise DataError(
                f"batch.global {global_batch} is no multiple of batch.micro * data-parallel ranks {micro} * {dp_size}"
            )
        self.samples = samples
        self.size = len(samples) if size is None else size
        if self.size > len(samples):
            raise DataError(f"{self.size:,} samples are asked of data that holds {len(samples):,}")
        self.global_batch = global_batch
        self.consumed_samples = 0
        self._micro, self._rank, self._ranks = micro, dp_rank, dp_size
        self._positions, self._cu_seqlens = positions, cu_seqlens
        self._ahead = prefetch
        self._batches: Iterator[GlobalBatch] | None = None
        self.seek(consumed_samples)

    def __len__(self) -> int:
        """Global batches still to come."""
        return max(0, self.size - self.consumed_samples) // self.global_batch

    def seek(self, consumed_samples: int) -> None:
        """Go on behind the first `consumed_samples` samples; 0 starts anew."""
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples {consumed_samples} is negative")
        self.close()
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self

    def __next__(self) -> GlobalBatch:
        if self._batches is None:
            batches = self._produce(self.consumed_samples)
            self._batches = Prefetch(batches, self._ahead) if self._ahead else batches
        batch = next(self._batches)
        self.consumed_samples += batch.samples
        return batch

    def close(self) -> None:
        """End the prefetching thread, if there is one. The loader can be iterated again afterwards."""
        batches, self._batches = self._batches, None
        if isinstance(batches, Prefetch):
            batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _produce(self, first: int) -> Iterator[GlobalBatch]:
        # A function of its arguments alone: a thread that holds the loader itself would keep it alive for ever.
        return _batches(
            self.samples,
            range(first, self.size - self.global_batch + 1, self.global_batch),
            self.global_batch,
            self._micro,
            self._rank,
            self._ranks,
            self._positions,
            self._cu_seqlens,
        )


def _batches(
    samples: Samples, starts: range, size: int, micro: int, rank: int, ranks: int, positions: bool, cu_seqlens: bool
) -> Iterator[GlobalBatch]:
    for start in starts:
        blocks = range(start + rank * micro, start + size, micro * ranks)
        batch = tuple(
            _micro_batch([samples.sample(i) for i in range(block, block + micro)], positions, cu_seqlens)
            for block in blocks
        )
        valid = sum(int((micro_batch.labels != IGNORE).sum()) for micro_batch in batch)
        yield GlobalBatch(batch, valid, size)


def _micro_batch(samples: list[Sample], positions: bool, cu_seqlens: bool) -> MicroBatch:
    labels = np.stack([sample.labels for sample in samples])
    labels[~np.stack([sample.mask for sample in samples])] = IGNORE
    length = labels.shape[1]
    cuts = [sample.cu_seqlens[:-1] + row * length for row, sample in enumerate(samples)]
    return MicroBatch(
        torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        torch.from_numpy(labels),
        torch.from_numpy(np.stack([sample.positions for sample in samples])) if positions else None,
        torch.from_numpy(np.concatenate([*cuts, [labels.size]]).astype(np.int32)) if cu_seqlens else None,
    )


def build_loader(cfg: "Config", split: str, dp_rank: int = 0, dp_size: int = 1, consumed_samples: int = 0) -> Loader:
    """The batches of a run: run.steps of "train", or the same run.eval_batches of "valid" or "test" each time.

    Raises DataError where files are missing or broken, tokenizers differ, or a split is too short.
    """
    size = cfg.batch.global_ * (cfg.run.steps if split == "train" else cfg.run.eval_batches)
    samples = build_samples(cfg.data, split, size, cfg.batch.seq_length, seed=cfg.data.seed)
    return Loader(
        samples,
        micro=cfg.batch.micro,
        global_batch=cfg.batch.global_,
        size=size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=consumed_samples,
        positions=cfg.data.reset_positions,
        cu_seqlens=cfg.data.document_mask,
        prefetch=cfg.data.prefetch,
    )
