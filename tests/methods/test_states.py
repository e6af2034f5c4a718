"""Running states of forked caches, and under speculation: each cache keeps its own."""

import pytest
import torch
from brute import kept_positions, run

from kvbudget.cache import KVCache
from kvbudget.policy.view import View
from tiny import random_text, tiny_model

WITH_STATES = [
    "h2o(every=1)",
    "tova",
    "snapkv(window=16)",
    "cake(window=16)",
    "lagkv(lag=16)",
    "roco",
    "expected_attention",
]


def states(cache):
    names = cache.parts.scorer.states
    return [View(layer).state(name).clone() for layer in cache.enforcer.layers for name in names]


@pytest.mark.parametrize("text", WITH_STATES)
def test_a_fork_goes_on_like_the_original_and_leaves_it_alone(text):
    model, ids = tiny_model("llama"), random_text(160)
    alone = KVCache(model, text, 48, when="every(1)")
    run(model, alone, ids[:, :120], [120])
    before, held = states(alone), [kept_positions(alone, layer) for layer in range(2)]
    fork = alone.fork()
    run(model, fork, random_text(20, seed=9), [1] * 20)
    assert all(a.equal(b) for a, b in zip(states(alone), before, strict=True))
    assert [kept_positions(alone, layer) for layer in range(2)] == held
    second = alone.fork()
    expected = run(model, alone, ids[:, 120:], [1] * 40)
    torch.testing.assert_close(run(model, second, ids[:, 120:], [1] * 40), expected, atol=1e-5, rtol=0)
    for one, other in zip(states(alone), states(second), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text", WITH_STATES)
def test_prompt_lookup_equals_greedy_decoding(text):
    """Speculated tokens that are taken back leave nothing behind in what is generated while all fits."""
    model = tiny_model("llama")
    ids = random_text(12).repeat(1, 5)
    plain = model.generate(ids, past_key_values=KVCache(model, text, 200), max_new_tokens=30, do_sample=False)
    guessed = model.generate(
        ids, past_key_values=KVCache(model, text, 200), max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert guessed.tolist() == plain.tolist()
