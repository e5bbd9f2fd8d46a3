"""Small models of every kind the transformer can be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megapre import kernels
from megapre.config import Model
from megapre.model import Transformer, initialize

SMALL: dict[str, Any] = {"layers": 2, "hidden": 48, "heads": 4, "vocab": 200, "context": 32, "ffn": 96}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2-untied-rms": {"family": "gpt2", "tied": False, "norm": "rmsnorm", "bias": False},
    "llama": {"family": "llama"},
    "llama-gqa-tied": {"family": "llama", "kv_heads": 2, "head_dim": 16, "tied": True, "bias": True},
    "qk-norm-geglu": {"family": "llama", "kv_heads": 1, "qk_norm": True, "activation": "geglu"},
}
Build = Callable[..., Transformer]


@pytest.fixture
def build() -> Build:
    """build(shape, dtype=..., **overrides): an initialised model of one of SHAPES."""

    def make(shape: str, seed: int = 1, dtype: torch.dtype = torch.float32, **overrides: Any) -> Transformer:
        cfg = Model(**{**SMALL, **SHAPES[shape], **overrides})
        model = Transformer(cfg, kernels.choose("cpu"), dtype=dtype)
        initialize(model, seed)
        return model

    return make


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """tokens(batch, length, vocab=200): random ones, the same every time."""
    return lambda batch, length, vocab=200: torch.randint(
        vocab, (batch, length), generator=torch.Generator().manual_seed(7)
    )
