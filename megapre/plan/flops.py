"""Model FLOPs: what the mathematics of a training step costs, whatever the implementation adds.

A product [T, in] x [in, out] is 2 T in out; the backward is twice the forward. Attention scores and their product with
v are 4 s N D a token in the forward where all s keys count. A causal mask needs half of that: "half" counts s / 2
(Megatron core, NeMo, FlashAttention), "full" counts s (Narayanan et al. 2021, PaLM, torchtitan). Every number that
depends on it names the one it took.

In full, for GPT (F = 4H, N D = H), this is Narayanan et al. 2021, equation 3, without recomputation:
72 B s L H^2 (1 + s / (6H) + V / (12 L H)) a step. Embedding look-ups, norms, activations, softmax are not counted.
"""

from typing import Literal, TypeAlias

from ..config import Model
from .params import layer

Attention: TypeAlias = Literal["half", "full"]
CONVENTION: Attention = "half"
"""What MFU counts here."""

BACKWARD = 2
"""Times the forward: one product for the gradient of the input, one for that of the weight."""


def per_token(model: Model, seq_length: int, attention: Attention = CONVENTION) -> int:
    """FLOPs of forward and backward for one token of a sequence of `seq_length`."""
    return sum(by_part(model, seq_length, attention).values())


def by_part(model: Model, seq_length: int, attention: Attention = CONVENTION) -> dict[str, int]:
    """FLOPs a token of "matrices" (the layers' products), "scores" (attention's own) and "head"."""
    seen = {"half": seq_length, "full": 2 * seq_length}[attention]  # in half keys, to stay whole
    forward = {
        "matrices": 2 * model.layers * layer(model).matrices,
        "scores": 2 * model.layers * seen * model.heads * model.head_dim,
        "head": 2 * model.vocab * model.hidden,
    }
    return {part: (1 + BACKWARD) * flops for part, flops in forward.items()}
