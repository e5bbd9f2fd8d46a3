"""Which parameters weight decay pulls towards zero."""

from torch import Tensor


def decays(name: str, param: Tensor) -> bool:
    """Matrices do (embeddings included); norm weights and biases, whose zero is no simpler model, do not."""
    return param.ndim >= 2
