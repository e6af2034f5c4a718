"""cache.fork: several questions from one context, memory that is shared, and writes that stay where they belong."""

from itertools import pairwise

import pytest
import torch

from kvbudget.cache import KVCache
from kvbudget.errors import CacheError
from residency import resident_tensors, storages
from tiny import random_text, tiny_model

CONTEXT = 250
CASES = [
    ("llama", "kvzip(chunk=150)", "30%", None),
    ("llama", "snapkv(window=8)+adakv", "30%", None),
    ("llama", "kivi(bits=4, residual=32)", None, None),
    ("llama", "kvzip(chunk=150)", "30%", "after_prefill"),
    ("llama", "snapkv(window=8)+kivi(bits=4, residual=32)", "50%", "over_budget"),
    ("lfm2", "kvzip(chunk=150)", "30%", None),
    ("lfm2", "snapkv(window=8)", "30%", "after_prefill"),
    ("qwen3_next", "full", None, None),
]


def context_and_questions(name, count=4):
    return tiny_model(name), random_text(CONTEXT), [random_text(6, seed=1 + i) for i in range(count)]


def new_cache(model, context, policy, budget, when):
    cache = KVCache(model, policy, budget, when=when)
    cache.prefill(model, context)
    return cache


def answer(model, cache, context, question, tokens=8):
    """Greedy tokens and the logits of the last of them."""
    ids = torch.cat([context, question], dim=1)
    out = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    cache.check_integrity()
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)


@pytest.mark.parametrize("name, policy, budget, when", CASES)
def test_each_fork_answers_like_a_cache_of_its_own(name, policy, budget, when):
    """Ten questions on one compressed context (two where the case is a variant)."""
    model, context, questions = context_and_questions(name, 10 if name == "llama" and when is None else 2)
    base = new_cache(model, context, policy, budget, when)
    forks = [base.fork() for _ in questions]
    # Round about, so that every fork was made before any of the others wrote.
    for fork, question in reversed(list(zip(forks, questions, strict=True))):
        tokens, logits = answer(model, fork, context, question)
        expected, reference = answer(model, new_cache(model, context, policy, budget, when), context, question)
        assert tokens == expected
        torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)
    assert base.seen == [CONTEXT]


@pytest.mark.parametrize(
    "name, policy, budget, length",
    [
        ("llama", "kvzip", "60%", 2500),
        ("llama", "snapkv(window=8)+adakv", "60%", 2500),
        ("llama", "kivi(bits=4, residual=32)", None, 6000),
        ("lfm2", "snapkv(window=8)", "60%", 2500),
    ],
)
def test_forks_share_memory(name, policy, budget, length):
    """Ten answered forks and their origin hold less than one and a half caches, where nothing more has to leave."""
    model, context = tiny_model(name, head_dim=64), random_text(length)
    base = new_cache(model, context, policy, budget, "after_prefill")
    own = sum(storages(base.tensors()).values())
    # A recurrent state changes with every token, so each fork has its own.
    states = 10 * base.report().parts.get("recurrent states", 0)
    forks = [base.fork() for _ in range(10)]
    together = storages(
        tensor for cache in (base, *forks) for tensor in resident_tensors(cache) if tensor is not cache.prefilled.ids
    )
    assert sum(together.values()) - states <= own
    for i, fork in enumerate(forks):
        answer(model, fork, context, random_text(6, seed=i), tokens=2)
    together = storages(tensor for cache in (base, *forks) for tensor in cache.tensors())
    assert sum(together.values()) - states < 1.5 * own


@pytest.mark.parametrize("name, policy, budget, when", CASES)
def test_writes_stay_in_the_fork_that_made_them(name, policy, budget, when):
    """Entries, positions, running scores and recurrent states: a fork's decoding changes nothing anywhere else."""
    model, context, questions = context_and_questions(name)
    base = new_cache(model, context, policy, budget, when)
    other = base.fork()
    held = [(tensor, tensor.clone()) for cache in (base, other) for tensor in cache.tensors()]
    measured = [list(row) for row in base.enforcer.measured]
    answer(model, base.fork(), context, questions[0], tokens=40)
    answer(model, other, context, questions[1], tokens=40)
    answer(model, base.fork().fork(), context, questions[2], tokens=3)
    assert all(torch.equal(tensor, copy) for tensor, copy in held[: len(held) // 2])
    assert base.enforcer.measured == measured
    base.check_integrity()
    late = answer(model, base, context, questions[3])[0]
    assert late == answer(model, new_cache(model, context, policy, budget, when), context, questions[3])[0]


def test_score_states_are_carried_along():
    """A fork goes on voting where its origin stood, and evicts the same entries."""
    model, context = tiny_model("llama"), random_text(200)
    base = new_cache(model, context, "snapkv(window=8)", 40, None)
    fork = base.fork()
    for cache in (fork, base):
        for step in range(40):
            with torch.inference_mode():
                model(context[:, step : step + 1], past_key_values=cache)
        cache.check_integrity()
    for one, two in zip(base.enforcer.layers, fork.enforcer.layers, strict=True):
        for name in ("position", "votes"):
            rows = [torch.cat([s.meta.padded(name) for s in store.main], dim=1) for store in (one, two)]
            torch.testing.assert_close(*rows)


@pytest.mark.parametrize("policy", ["full", "kivi(bits=4, residual=32)", "snapkv(window=8)+kivi(bits=4, residual=32)"])
def test_generations_of_forks(policy):
    """Forks of forks, each with a few tokens more, hold what one cache would hold that saw all of them."""
    model, text = tiny_model("llama"), random_text(400)
    budget = "60%" if "snapkv" in policy else None
    plain = KVCache(model, policy, budget, when="every(1)")
    forks = [KVCache(model, policy, budget, when="every(1)")]
    for begin, end in pairwise([0, 250, 255, 300, 301, 400]):
        forks.append(forks[-1].fork())
        with torch.inference_mode():
            pair = [model(text[:, begin:end], past_key_values=cache).logits for cache in (forks[-1], plain)]
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)
        forks[-1].check_integrity()
        assert forks[-1].report().kept == plain.report().kept
    assert [fork.get_seq_length() for fork in forks] == [0, 250, 255, 300, 301, 400]


def test_under_a_byte_budget_forks_hold_no_code_twice():
    model, text = tiny_model("llama"), random_text(300)
    policy, budget = "snapkv(window=8)+kivi(bits=4, residual=32)", "64KiB"
    base = new_cache(model, text, policy, budget, None)
    fork = base.fork()
    for step in range(80):
        with torch.inference_mode():
            model(text[:, step : step + 1], past_key_values=fork)
        fork.check_integrity()


def test_forks_remember_the_text_and_not_each_others():
    model, context, (first, second, *_) = context_and_questions("llama")
    base = new_cache(model, context, "full", None, None)
    one, two = base.fork(), base.fork()
    one.prefill(model, torch.cat([context, first], dim=1))
    two.prefill(model, torch.cat([context, second], dim=1))
    assert one.seen == two.seen == [CONTEXT + 6] and base.seen == [CONTEXT]
    with pytest.raises(CacheError, match=f"at position {CONTEXT}"):
        one.prefill(model, torch.cat([context, second, first], dim=1))


def test_an_origin_that_goes_away_leaves_its_forks_whole():
    model, context, (question, *_) = context_and_questions("llama")
    base = new_cache(model, context, "kvzip(chunk=150)", "30%", None)
    fork = base.fork()
    base.reset()
    with torch.inference_mode():
        base.prefill(model, random_text(90, seed=9))
    expected = answer(model, new_cache(model, context, "kvzip(chunk=150)", "30%", None), context, question)[0]
    assert answer(model, fork, context, question)[0] == expected


def test_a_broken_cache_is_not_forked():
    model = tiny_model("llama")
    cache = KVCache(model, "full")
    cache.broken = "layer 1 of 2"
    with pytest.raises(CacheError, match="cannot be forked"):
        cache.fork()


@pytest.mark.parametrize("policy", ["streaming_llm", "knorm(recent=5)"])
def test_sliding_windows_of_a_fork_stay_inside_a_byte_budget(policy):
    """What a fork holds beside the window that it shares has only the room that the window has left."""
    model, text = tiny_model("gemma2"), random_text(200)
    cache = KVCache(model, policy, "57500B")
    caches = [cache]
    for begin, end in pairwise([0, 60, *range(61, 200)]):
        if end == 80:
            caches.append(cache.fork())
        for each in caches:
            with torch.inference_mode():
                model(text[:, begin:end], past_key_values=each)
            each.check_integrity()
