"""Finch against brute force, the growing budget, and keys at the positions that they have inside of the cache."""

import pytest
import torch
from brute import kept_positions
from brute_plan import PlanBrute
from induction import induction_model

from kvbudget.cache import KVCache
from kvbudget.errors import CacheError, PolicyError
from tiny import left_padded, random_text, tiny_model


def question_sum(normalize, shared):
    def judge(held, own):
        scores = []
        for logits, among in zip(held, own, strict=True):
            weights = torch.cat([logits, among], dim=-1).softmax(-1)[..., : logits.shape[-1]]
            total = logits.shape[-1] + among.shape[-1]
            visible = logits.shape[-1] + 1 + torch.arange(among.shape[-1])
            share = visible / total if normalize else torch.ones(len(visible))
            scores.append((weights * share[:, None]).sum((0, 1)))
        return [torch.stack(scores).sum(0)] * len(scores) if shared else scores

    return judge


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("normalize, shared", [(True, True), (False, True), (True, False)])
def test_chunks_judged_by_the_question(heads, normalize, shared):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    policy = f"finch(chunk=50, normalize={normalize}, shared={shared}, positions=original)"
    brute = PlanBrute(question_sum(normalize, shared))
    counts = brute.run(model, KVCache(model, policy, 60), random_text(200), question_ids=random_text(12, seed=1))
    # (60 - 12) entries for 200 tokens, granted as the text grows
    assert counts == [[[n] * heads[1]] * 2 for n in (12, 24, 36, 48)]


def test_the_end_of_the_prompt_stands_for_a_question():
    model, ids = tiny_model("llama"), random_text(150)
    given, at_the_end = KVCache(model, "finch(chunk=45)", 60), KVCache(model, "finch(chunk=45, window=15)", 60)
    given.prefill(model, ids[:, :135], question_ids=ids[:, 135:])
    with torch.inference_mode():
        expected = model(ids[:, 135:], past_key_values=given).logits[:, -1]
    torch.testing.assert_close(at_the_end.prefill(model, ids), expected)
    for layer in range(2):
        assert kept_positions(given, layer) == kept_positions(at_the_end, layer)


def test_everything_fits():
    model, ids = tiny_model("llama"), random_text(130)
    cache = KVCache(model, "finch(chunk=40)", 130)
    torch.testing.assert_close(
        cache.prefill(model, ids), KVCache(model, "full").prefill(model, ids), atol=1e-5, rtol=1e-4
    )
    assert cache.enforcer.evictions == 0
    short = KVCache(model, "finch", 60)
    short.prefill(model, ids[:, :20])
    assert short.report().kept == [[[20, 20]]] * 2, "shorter than the window"


@pytest.mark.parametrize("name", ["llama", "glm4", "cohere"])
def test_positions_are_those_inside_of_the_cache(name):
    """In one layer, keys know of nothing but their token and position: what is kept must be as a text of its own."""
    model, ids, question = tiny_model(name, num_hidden_layers=1), random_text(220), random_text(9, seed=1)
    cache = KVCache(model, "finch(chunk=40)", 50)
    cache.prefill(model, ids, question_ids=question)
    (kept,) = {tuple(row) for row in kept_positions(cache, 0)}
    assert len(kept) == 41 and kept[-1] - kept[0] > 100
    with torch.inference_mode():
        after = model(question, past_key_values=cache).logits
        expected = model(torch.cat([ids[:, list(kept)], question], dim=1), past_key_values=KVCache(model)).logits[
            :, -9:
        ]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        for token in random_text(60, seed=2)[0]:  # more evictions, one by one
            after = model(token.view(1, 1), past_key_values=cache).logits
            cache.check_integrity()
    (kept,) = {tuple(row) for row in kept_positions(cache, 0)}
    text = torch.cat([ids, question, random_text(60, seed=2)], dim=1)[:, list(kept)]
    with torch.inference_mode():
        alone = model(text, past_key_values=KVCache(model)).logits[:, -1:]
    assert kept[-1] == 288
    torch.testing.assert_close(after, alone, atol=1e-3, rtol=1e-3)


def test_the_cache_never_holds_more_than_the_budget_and_a_chunk():
    model, ids = tiny_model("llama"), random_text(400)
    cache, most = KVCache(model, "finch", 64), []
    cache.prefill(model, ids, progress=lambda done, total: most.append(cache.report().kept_entries // 4))
    assert max(most) <= 64 + 64 and cache.report().kept == [[[64, 64]]] * 2
    hard = KVCache(model, "finch", "20KiB")
    hard.prefill(model, ids)
    hard.check_integrity()


def test_what_the_question_asks_for_survives_all_chunks():
    """The question repeats the tokens at 10 and 11 of the first chunk of four; what followed them stays."""
    model = induction_model()
    ids = torch.randperm(120, generator=torch.Generator().manual_seed(0))[None]
    cache = KVCache(model, "finch(chunk=30, shared=False, positions=original)", 2 + 12)
    cache.prefill(model, ids, question_ids=ids[:, 10:12])
    followed, found = kept_positions(cache, 1)
    assert len(followed) == 12 and {11, 12} <= set(followed) and {10, 11} <= set(found)


def test_padded_sequences_equal_their_single_runs_in_one_chunk():
    model, texts, question = tiny_model("llama"), [random_text(90, seed=1), random_text(41, seed=2)], random_text(7)
    ids, mask = left_padded(texts)
    batch = KVCache(model, "finch(chunk=100)", 30)
    batch.prefill(model, ids, attention_mask=mask, question_ids=question)
    for b, text in enumerate(texts):
        single = KVCache(model, "finch(chunk=100)", 30)
        single.prefill(model, text, question_ids=question)
        assert [kept_positions(batch, i, b) for i in range(2)] == [kept_positions(single, i) for i in range(2)]


def test_coded_keys_stay_where_they_are():
    """With 8 bits, entries that were coded keep their old positions and the rest moves: close, but not the same."""
    model, ids = tiny_model("llama"), random_text(300)
    cache = KVCache(model, "finch(chunk=60)+kivi(bits=8, residual=32)", 100)
    logits = cache.prefill(model, ids)
    cache.check_integrity()
    assert cache.report().parts["codec metadata"] > 0 and bool(logits.isfinite().all())


def test_refusals():
    model, ids = tiny_model("llama"), random_text(60)
    with pytest.raises(PolicyError, match=r"cache\.prefill"), torch.inference_mode():
        model(ids, past_key_values=KVCache(model, "finch", 40))
    with pytest.raises(PolicyError, match="finch keeps the same entries in all heads"):
        KVCache(model, "finch+adakv", 40)
    cache = KVCache(model, "finch(chunk=20)", 40)

    def interrupt(done, total):
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.prefill(model, ids, progress=interrupt)
    with pytest.raises(CacheError, match="plan of finch"):
        cache.prefill(model, random_text(80))
