"""Hugging Face configs and weights, in and out: GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM.

model_cfg, state = from_hf(json_of_config, tensors)      config, state = to_hf(model_cfg, state)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megapre.config import Model
from megapre.interop.errors import InteropError
from megapre.interop.hf_config import ARCHITECTURE_OF, ARCHITECTURES, Config
from megapre.interop.hf_weights import State, gather, only_weights, pieces, scatter

__all__ = ["InteropError", "from_hf", "to_hf"]


def from_hf(config: Config, state: State) -> tuple[Model, dict[str, Tensor]]:
    """The model section and weights (true vocabulary, for `model.load_state`) of a Hugging Face model.

    config: the dict of config.json. state: its state dict, on any device, in any dtype.
    Raises InteropError with every feature of the config and every tensor that cannot be mapped.
    """
    names = config.get("architectures") or [ARCHITECTURE_OF.get(str(config.get("model_type")), "none named")]
    if names[0] not in ARCHITECTURES:
        raise InteropError(f"architecture {names[0]} is not known here; there are {', '.join(ARCHITECTURES)}")
    model = ARCHITECTURES[names[0]].read(config)
    return model, gather(pieces(model), only_weights(state, model))


def to_hf(model: Model, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json's dict and the state dict of the Hugging Face model that computes the same.

    state: as `model.export_state` gives it. Split tensors are contiguous; the others share memory with `state`.
    Raises InteropError for a model that no known architecture can express.
    """
    reasons = {name: architecture.lacks(model) for name, architecture in ARCHITECTURES.items()}
    for name, architecture in ARCHITECTURES.items():
        if not reasons[name]:
            return architecture.write(model), scatter(pieces(model), state)
    lines = "".join(f"\n  {name} has no {', no '.join(lacks)}" for name, lacks in reasons.items())
    raise InteropError(f"no known Hugging Face architecture computes what this model does:{lines}")
