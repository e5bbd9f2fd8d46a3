"""A transformer as one writes it in an afternoon, in the manner of nanoGPT: a peer for the training step.

GPT-2 (learned positions, LayerNorm, GELU, biases) and Llama (rotary positions, RMSNorm, SwiGLU, no biases), tied head.
torch's own modules, F.scaled_dot_product_attention, F.cross_entropy over the whole logits; nothing of megapre. Its
parameters have the names of megapre's. As nanoGPT's, its vocabulary is padded, to a multiple of 64: products of odd
width are slow (the weight gradient of 50257 by a fifth).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, S, D]; cos, sin [S, D / 2]; pairs (i, i + D / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias), nn.Linear(hidden, hidden, bias)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, hidden))


class GeluMLP(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int, llama: bool) -> None:
        super().__init__()
        norm = (lambda: nn.RMSNorm(hidden, eps=1e-5)) if llama else (lambda: nn.LayerNorm(hidden, eps=1e-5))
        self.norm1, self.attn, self.norm2 = norm(), Attention(hidden, heads, not llama), norm()
        self.mlp = SwiGLU(hidden, ffn) if llama else GeluMLP(hidden, ffn)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class PlainModel(nn.Module):
    """`shape`: family, layers, hidden, heads, ffn, vocab. Call it with tokens and labels [B, S] for the mean loss."""

    def __init__(self, shape: dict[str, Any], context: int) -> None:
        super().__init__()
        hidden, llama, self.vocab = shape["hidden"], shape["family"] == "llama", shape["vocab"]
        self.embed = nn.Embedding(-(-self.vocab // 64) * 64, hidden)
        self.positions = None if llama else nn.Embedding(context, hidden)
        self.blocks = nn.ModuleList(Block(hidden, shape["heads"], shape["ffn"], llama) for _ in range(shape["layers"]))
        self.norm = nn.RMSNorm(hidden, eps=1e-5) if llama else nn.LayerNorm(hidden, eps=1e-5)
        half = hidden // shape["heads"] // 2
        frequency = 1.0 / 10000 ** (torch.arange(half) / half)
        angle = torch.outer(torch.arange(context).float(), frequency)
        self.cos, self.sin = (angle.cos(), angle.sin()) if llama else (None, None)

    def to(self, device: Any, dtype: torch.dtype) -> "PlainModel":  # the tables stay fp32
        if self.cos is not None:
            self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return super().to(device, dtype)

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `megapre.model.state.export_state` gives."""
        padding = (0, 0, 0, self.embed.num_embeddings - self.vocab)
        self.load_state_dict({**state, "embed.weight": F.pad(state["embed.weight"], padding)})

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)[..., : self.vocab]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
