"""Text to tokens to samples: Megatron's file and index formats, blends, the loader, tokenizers.

What needs torch (the loader) or a tokenizer's library is imported on first use: `megapre.data` itself needs only NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .blend import BlendIndex, build_blend, build_exhaustive_blend
from .dataset import Blend, GPTDataset, Sample
from .errors import DataError
from .gpt_index import GPTIndex, build_gpt_index, split_ranges
from .indexed import IndexedDataset, IndexedWriter
from .sidecar import Sidecar, read_sidecar, write_sidecar
from .sources import sidecar_of, tokenizer_path, with_vocab_of_data

if TYPE_CHECKING:
    from .loader import GlobalBatch, Loader, MicroBatch, build_loader
    from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_LAZY = {
    "GlobalBatch": "loader",
    "Loader": "loader",
    "MicroBatch": "loader",
    "build_loader": "loader",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
}

__all__ = [
    "Blend",
    "BlendIndex",
    "DataError",
    "GPTDataset",
    "GPTIndex",
    "GlobalBatch",
    "IndexedDataset",
    "IndexedWriter",
    "Loader",
    "MicroBatch",
    "Sample",
    "Sidecar",
    "Tokenizer",
    "build_blend",
    "build_exhaustive_blend",
    "build_gpt_index",
    "build_loader",
    "load_tokenizer",
    "read_sidecar",
    "sidecar_of",
    "split_ranges",
    "tokenizer_path",
    "train_tokenizer",
    "with_vocab_of_data",
    "write_sidecar",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
