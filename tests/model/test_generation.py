"""Generation: the cache changes nothing, the choice is exactly what its definition says."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from megapre.model import ModelError, generate
from megapre.model.cache import KVCache
from megapre.model.generate import candidates, pick


def sharpen(model):
    """Spread the distributions, so that choices are not all near ties."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return model


@pytest.mark.parametrize("pieces", [[12, 1, 1, 1], [1] * 15, [4, 7, 4], [15]])
def test_cached_pieces_equal_the_whole(build, shape, tokens, pieces):
    model = sharpen(build(shape))
    x = tokens(3, 15)
    cache = KVCache(model.cfg, 3, 20, dtype=torch.float32, device="cpu")
    cache.k_LBCKD.fill_(torch.nan)  # nothing beyond what was written may be read
    cache.v_LBCKD.fill_(torch.nan)
    with torch.no_grad():
        got = torch.cat([model(piece, cache=cache) for piece in x.split(pieces, 1)], 1)
        assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    assert cache.length == 15


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_with_cache_equals_without(build, shape, tokens, temperature):
    model = sharpen(build(shape))
    runs = [
        list(generate(model, tokens(2, 5), 28, temperature=temperature, top_k=20, seed=3, cache=cached))
        for cached in (True, False)
    ]
    assert len(runs[0]) == len(runs[1]) == 28  # 5 + 28 - 1 = the whole context
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.tokens_B, b.tokens_B)
        assert_close(a.probabilities_BC, b.probabilities_BC, rtol=1e-3, atol=1e-5)


def test_bf16_generates(build, tokens):
    model = build("llama", dtype=torch.bfloat16)
    steps = list(generate(model, tokens(1, 5)[0], 4, temperature=0))
    assert [len(step.tokens_B) for step in steps] == [1] * 4


def test_a_batch_is_its_prompts_alone(build, tokens):
    model = sharpen(build("llama"))
    x = tokens(3, 6)
    together = torch.stack([s.tokens_B for s in generate(model, x, 8, temperature=0)], 1)
    alone = [torch.cat([s.tokens_B for s in generate(model, row, 8, temperature=0)]) for row in x]
    assert torch.equal(together, torch.stack(alone))


def test_explanations_are_the_models_own_probabilities(build, tokens):
    model = sharpen(build("gpt2"))
    x = tokens(2, 6)
    step = next(iter(generate(model, x, 1, temperature=0.3, top_k=2, top_p=0.5)))
    with torch.no_grad():
        want = model(x)[:, -1].softmax(-1).topk(10)
    assert torch.equal(step.likeliest_BC, want.indices)
    assert_close(step.probabilities_BC, want.values, rtol=1e-4, atol=0)


def test_eos_ends_when_every_prompt_has_met_it(build, tokens):
    model = sharpen(build("gpt2"))

    def run(eos_id):
        steps = generate(model, tokens(2, 4), 20, temperature=1.5, seed=11, eos_id=eos_id)
        return torch.stack([step.tokens_B for step in steps], 1)

    free = run(None)
    eos = int(free[0, 3])
    assert eos not in free[0, :3] and eos not in free[1]  # the second prompt goes on alone, with the same draws
    ended = run(eos)
    assert (ended[0, 3:] == eos).all() and torch.equal(ended[0, :3], free[0, :3])
    assert torch.equal(ended[1], free[1])
    greedy = [int(s.tokens_B) for s in generate(model, tokens(1, 4), 20, temperature=0)]
    stopped = [int(s.tokens_B) for s in generate(model, tokens(1, 4), 20, temperature=0, eos_id=greedy[2])]
    assert stopped == greedy[: greedy.index(greedy[2]) + 1]


def test_seed_decides(build, tokens):
    model = build("gpt2")

    def run(seed):
        return [int(s.tokens_B) for s in generate(model, tokens(1, 4), 12, seed=seed)]

    assert run(1) == run(1) != run(2)


def test_no_gradient_state_leaks_through_the_yield(build, tokens):
    for _ in generate(build("gpt2"), tokens(1, 4), 2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "at least one token"),
        ([1] * 33, {}, "context is 32: shorten the prompt"),
        ([1] * 30, {"max_new_tokens": 4}, "30 tokens and 4 new ones need 33 positions.*32: at most 3 new tokens fit"),
        ([3, 200], {}, r"tokens 3 .. 200; the model's vocabulary is 0 .. 199"),
        ([1], {"temperature": -1.0}, "temperature >= 0"),
        ([1], {"temperature": float("nan")}, "temperature >= 0"),
        ([1], {"top_p": 0.0}, "0 < top_p <= 1"),
        ([1], {"top_k": -1}, "top_k >= 0"),
    ],
)
def test_impossible_requests_are_refused_at_once(build, prompt, settings, message):
    model = build("gpt2")
    with pytest.raises(ModelError, match=message):  # at the call, not at the first step
        generate(model, torch.tensor(prompt, dtype=torch.int64), **{"max_new_tokens": 1, **settings})


def test_the_whole_context_can_be_used(build, tokens):
    assert len(list(generate(build("gpt2"), tokens(1, 32), 1))) == 1
    assert list(generate(build("gpt2"), tokens(1, 32), 0)) == []


# ---- the choice

weights = st.lists(st.integers(1, 40), min_size=1, max_size=7)


@given(weights, st.integers(0, 9), st.integers(1, 64))
def test_candidates_are_the_smallest_sufficient_set(counts, top_k, sixty_fourths):
    """Against all subsets, with integer weights so that `at least top_p` is decided exactly."""
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))[: top_k or None]
    kept = sum(counts[i] for i in order)

    def excess(subset):
        return 64 * sum(counts[i] for i in subset) - sixty_fourths * kept

    # A sum that meets top_p exactly is decided by rounding here; the next test has such sums in binary fractions.
    subsets = [s for size in range(1, len(order) + 1) for s in itertools.combinations(order, size)]
    assume(all(excess(order[:n]) != 0 or n == len(order) for n in range(1, len(order) + 1)))
    smallest = min(len(subset) for subset in subsets if excess(subset) >= 0)
    want = order[:smallest]
    ids, probabilities = candidates(torch.tensor([counts]).double().log(), 1.0, top_k, sixty_fourths / 64)
    assert ids[0][probabilities[0] > 0].tolist() == want
    assert_close(
        probabilities[0, :smallest],
        torch.tensor([counts[i] for i in want]).double() / sum(counts[i] for i in want),
    )


def test_ties_go_to_the_lower_id():
    ids, probabilities = candidates(torch.zeros(1, 8, dtype=torch.float64), 1.0, 0, 0.25)
    assert ids[0][probabilities[0] > 0].tolist() == [0, 1]  # 1/8 + 1/8, exact in binary
    ids, probabilities = candidates(torch.zeros(1, 8, dtype=torch.float64), 1.0, 3, 1.0)
    assert ids.tolist() == [[0, 1, 2]]
    assert pick(torch.zeros(1, 8, dtype=torch.float64), 0.0, 0, 1.0, torch.Generator()).tolist() == [0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "want"),
    [
        (1.0, 0, 1.0, [0.4, 0.1, 0.3, 0.2]),
        (0.5, 0, 1.0, [0.16 / 0.30, 0.01 / 0.30, 0.09 / 0.30, 0.04 / 0.30]),
        (1.0, 2, 1.0, [4 / 7, 0, 3 / 7, 0]),
        (1.0, 0, 0.65, [4 / 7, 0, 3 / 7, 0]),
        (1.0, 0, 0.75, [4 / 9, 0, 3 / 9, 2 / 9]),
        (1.0, 3, 0.6, [4 / 7, 0, 3 / 7, 0]),  # of 4/9, 3/9, 2/9 two are needed for 0.6
        (1.0, 0, 0.05, [1, 0, 0, 0]),
        (0.0, 0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p, want):
    count = 40_000
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64).log().expand(count, 4)
    drawn = pick(logits, temperature, top_k, top_p, torch.Generator().manual_seed(5))
    observed = drawn.bincount(minlength=4).double() / count
    want_t = torch.tensor(want, dtype=torch.float64)
    assert not observed[want_t == 0].any()
    assert ((observed - want_t).abs() <= 4.5 * (want_t * (1 - want_t) / count).sqrt() + 1e-12).all()


def test_extreme_logits_do_not_break_the_choice():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, -1e30, -1e30]], dtype=torch.float64)
    drawn = pick(logits, 1e-3, 0, 0.9, torch.Generator().manual_seed(1))
    assert drawn[0] == 0 and 0 <= drawn[1] <= 2


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_that_the_tokenizer_lacks_do_not_exist(build, tokens, temperature):
    model = sharpen(build("llama"))
    x = tokens(2, 4)
    steps = list(generate(model, x, 20, temperature=temperature, vocab=30))
    assert all(int(step.tokens_B.max()) < 30 and int(step.likeliest_BC.max()) < 30 for step in steps)
    with torch.no_grad():
        odds = model(x)[:, -1, :30].double().softmax(-1)
    assert_close(steps[0].probabilities_BC, odds.topk(10).values.float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ModelError, match="no token"):
        generate(model, x, 1, vocab=0)
