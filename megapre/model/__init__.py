"""The model: one transformer over `megapre.kernels`, its initial weights, its decay rule, generation."""

from megapre.model.decay import decays
from megapre.model.errors import ModelError
from megapre.model.generate import generate
from megapre.model.init import initialize
from megapre.model.state import export_state, load_state
from megapre.model.transformer import Transformer

__all__ = ["ModelError", "Transformer", "decays", "export_state", "generate", "initialize", "load_state"]
