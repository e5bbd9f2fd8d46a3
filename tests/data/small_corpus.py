"""Small datasets whose every token is known, and configurations that read them."""

from pathlib import Path
from typing import Any

import numpy as np

from megapre.config import Config
from megapre.data import IndexedWriter, Sidecar, write_sidecar

EOS = 0


def write_corpus(prefix: Path, documents: int = 60, seed: int = 0, longest: int = 40, sidecar: bool = True) -> str:
    """Documents of 1 to `longest` random tokens, the last of each EOS. Returns the prefix."""
    random = np.random.default_rng(seed)
    total = 0
    with IndexedWriter(prefix, vocab_size=1000) as writer:
        for length in random.integers(1, longest + 1, documents).tolist():
            writer.add_document(np.append(random.integers(1, 1000, length - 1), EOS))
            total += length
    if sidecar:
        write_sidecar(prefix, Sidecar("t.json", "ab" * 32, 1000, EOS, True, documents, total, 4 * total))
    return str(prefix)


def config(train: Any, *, steps: int = 6, micro: int = 2, global_: int = 8, seq: int = 16, **data: Any) -> Config:
    """A run of a tiny model on `train`; what is left over goes to its data section."""
    return Config.model_validate(
        {
            "model": {"family": "gpt2", "layers": 1, "hidden": 8, "heads": 1, "context": 64, "vocab": 1000},
            "batch": {"micro": micro, "global": global_, "seq_length": seq},
            "optim": {"lr": 1e-3},
            "data": {"train": train, "prefetch": 0, **data},
            "run": {"steps": steps, "eval_batches": 2},
        }
    )
