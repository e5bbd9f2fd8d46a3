"""Continue a text: feed the tokens, look at the distribution of the next one, choose, repeat.

The choice, in this order: logits divided by `temperature`; the `top_k` likeliest kept; of these, renormalised, the
smallest set of likeliest tokens whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et al. 2020,
arXiv:1904.09751, section 3.1); one drawn from what is left, by inverting its cumulative distribution in fp64.
Equally likely tokens are ordered by id, so both sets are defined exactly.

Legend: B batch (prompts of one length), S prompt length, V vocabulary, C kept candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megapre.model.cache import KVCache
from megapre.model.errors import ModelError
from megapre.model.transformer import Transformer

EXPLAINED = 10


class Step(NamedTuple):
    """One generated token per prompt, and what the model thought: its ten likeliest (fewer if V < 10), best first.

    The probabilities are the model's own, before temperature, top-k and top-p.
    """

    tokens_B: Tensor
    likeliest_BC: Tensor
    probabilities_BC: Tensor


def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    cache: bool = True,
    vocab: int | None = None,
) -> Iterator[Step]:
    """Yield up to max_new_tokens steps; end early, after yielding it, when every prompt has met eos_id.

    tokens: int64 [S] or [B, S], prompts of equal length. temperature 0 is greedy; top_k 0 and top_p 1 keep every token.
    A prompt that has met eos_id repeats it until the others have. Steps come on the CPU; the same seed gives the same
    tokens. cache=False recomputes the whole text for every token, to the same result up to rounding. Of a model whose
    vocabulary is larger than its tokenizer's, vocab is the tokenizer's: no id from there on exists.

    Raises ModelError, before anything is computed, for settings out of range, tokens outside the vocabulary, and texts
    longer than the context.
    """
    prompt_BS = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
    _check(model, prompt_BS, max_new_tokens, temperature, top_k, top_p)
    if vocab is not None and vocab < 1:
        raise ModelError(f"vocab {vocab} leaves no token to choose")
    return _steps(model, prompt_BS, max_new_tokens, (temperature, top_k, top_p), seed, eos_id, cache, vocab)


def _check(
    model: Transformer, prompt_BS: Tensor, max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    if prompt_BS.ndim != 2 or prompt_BS.numel() == 0:
        raise ModelError(f"a prompt needs at least one token; got a tensor of shape {tuple(prompt_BS.shape)}")
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and max_new_tokens >= 0):
        raise ModelError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}, {max_new_tokens} new tokens: "
            "needed are temperature >= 0, top_k >= 0, 0 < top_p <= 1 and a count >= 0"
        )
    low, high = int(prompt_BS.min()), int(prompt_BS.max())
    if low < 0 or high >= model.cfg.vocab:
        raise ModelError(f"prompt holds tokens {low} .. {high}; the model's vocabulary is 0 .. {model.cfg.vocab - 1}")
    length, context = prompt_BS.shape[1], model.cfg.context
    if length + max_new_tokens - 1 > context:  # the last new token is not fed back
        fits = f"at most {context - length + 1} new tokens fit" if length <= context else "shorten the prompt"
        raise ModelError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones need {length + max_new_tokens - 1} positions; "
            f"the model's context is {context}: {fits}"
        )


def _steps(
    model: Transformer,
    text_BS: Tensor,
    max_new_tokens: int,
    choice: tuple[float, int, float],
    seed: int,
    eos_id: int | None,
    cached: bool,
    vocab: int | None,
) -> Iterator[Step]:
    weight = model.head_weight
    batch, length = text_BS.shape
    text_BS = text_BS.to(weight.device)
    generator = torch.Generator().manual_seed(seed)
    cache = None
    if cached and max_new_tokens > 0:
        cache = KVCache(model.cfg, batch, length + max_new_tokens - 1, dtype=weight.dtype, device=weight.device)
    done_B = torch.zeros(batch, dtype=torch.bool)
    new_BS = text_BS
    for _ in range(max_new_tokens):
        with torch.no_grad():  # not around the yield, where it would leak into the caller
            y_BSH = model.hidden(new_BS if cache else text_BS, cache=cache)
            logits_BV = model.logits(y_BSH[:, -1])[:, :vocab].double().cpu()
        probabilities_BV = logits_BV.softmax(-1)
        likeliest = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        tokens_B = pick(logits_BV, *choice, generator)
        if eos_id is not None:
            tokens_B = torch.where(done_B, eos_id, tokens_B)
            done_B |= tokens_B == eos_id
        yield Step(tokens_B, likeliest.indices[:, :EXPLAINED], likeliest.values[:, :EXPLAINED].float())
        if eos_id is not None and bool(done_B.all()):
            return
        new_BS = tokens_B.unsqueeze(1).to(text_BS.device)
        text_BS = torch.cat((text_BS, new_BS), dim=1)


def pick(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row, int64 [B]. Uses one uniform number per row of `generator`, or none when greedy."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    ids_BC, probabilities_BC = candidates(logits_BV, temperature, top_k, top_p)
    below_BC = probabilities_BC.cumsum(-1)
    uniform_B1 = torch.rand(len(logits_BV), 1, dtype=torch.float64, generator=generator)
    # Scaled by the actual total, which rounding may leave beside 1, and right-continuous: no empty candidate is hit.
    column_B1 = torch.searchsorted(below_BC, uniform_B1 * below_BC[:, -1:], right=True)
    return ids_BC.gather(1, column_B1.clamp_(max=ids_BC.shape[1] - 1)).squeeze(1)


def candidates(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Ids and fp64 probabilities [B, C] of the tokens that may be drawn, likeliest first; excluded ones have 0."""
    scaled = (logits_BV.double() / temperature).sort(dim=-1, descending=True, stable=True)
    count = min(top_k, logits_BV.shape[-1]) if top_k else logits_BV.shape[-1]
    ids_BC, probabilities_BC = scaled.indices[:, :count], scaled.values[:, :count].softmax(-1)
    # A token belongs to the smallest sufficient set if those before it do not suffice. The first always does.
    before_BC = F.pad(probabilities_BC.cumsum(-1)[:, :-1], (1, 0))
    probabilities_BC = torch.where(before_BC < top_p, probabilities_BC, 0.0)
    return ids_BC, probabilities_BC / probabilities_BC.sum(-1, keepdim=True)
