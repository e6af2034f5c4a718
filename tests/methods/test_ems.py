"""EMS: its score against eager attention, its limits, and which entries join which."""

import pytest
import torch
from brute import kept_positions, run, with_newest
from torch.nn.functional import avg_pool1d, cosine_similarity

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.methods.ems import GlobalLocal
from kvbudget.policy.scorers.received import AccumulatedAttention
from kvbudget.policy.scorers.window import WindowAttention
from kvbudget.policy.view import View
from tiny import random_text, tiny_model

WINDOW, LENGTH, BUDGET = 16, 150, 40


def test_score_merge_and_drop():
    """One layer, from scratch: the ranking, the candidates, the zero class and the weights."""
    model, ids = tiny_model("llama", num_hidden_layers=1), random_text(LENGTH)
    cache = KVCache(model, f"ems(window={WINDOW}, candidates=1.5, threshold=0.6)", BUDGET)
    recorded = {}
    attend = cache.attend
    cache.attend = lambda index, call, *args: recorded.update({"call": call}) or attend(index, call, *args)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    del cache.attend
    keys, values = recorded["call"].key[0], recorded["call"].value[0]
    plain = tiny_model("llama", num_hidden_layers=1)
    plain.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = plain(ids, output_attentions=True).attentions[0][0].unflatten(0, (2, -1)).mean(1)
    early = LENGTH - WINDOW
    merged = dropped = 0
    for h, head in enumerate(weights):
        overall = head[:, :early].sum(0) / (LENGTH - torch.arange(early))
        local = head[-WINDOW:, :early].sum(0)
        score = avg_pool1d((local + overall * local.sum() / overall.sum())[None], 7, stride=1, padding=3)[0]
        padded = torch.cat([score, torch.zeros(WINDOW)])
        kept = with_newest(padded, torch.arange(LENGTH), early, BUDGET).sort().values
        assert kept_positions(cache, 0)[h] == kept.tolist()
        rest = [i for i in score.argsort(descending=True).tolist() if i not in kept.tolist()]
        cosine = cosine_similarity(keys[h, rest, None], keys[h, kept][None], dim=-1)
        joins: dict[int, list[int]] = {}
        for i, row in list(zip(rest, cosine, strict=True))[: BUDGET // 2]:
            if row.max() >= 0.6:
                joins.setdefault(int(row.argmax()), []).append(i)
                merged += 1
            else:
                dropped += 1
        stored = cache.enforcer.layers[0].main[0].values()[h]
        for a, at in enumerate(kept.tolist()):
            mine = joins.get(a, [])
            own = torch.maximum(padded[at], score[mine].mean()) if mine else padded[at] + 1
            total = own + score[mine].sum()
            expected = (own * values[h, at] + (score[mine, None] * values[h, mine]).sum(0)) / total
            torch.testing.assert_close(stored[a], expected, atol=1e-4, rtol=1e-3)
    assert merged > 5 and dropped > 5


@pytest.mark.parametrize(("threshold", "merges"), [(1.5, False), (0.0, True)])
def test_a_threshold_above_one_is_pure_eviction(threshold, merges):
    model, ids = tiny_model("llama", num_hidden_layers=1), random_text(LENGTH)
    cache = KVCache(model, f"snapkv(window=16)+ems(threshold={threshold}, candidates=0)", BUDGET)
    plain = KVCache(model, "snapkv(window=16)", BUDGET)
    for each in (cache, plain):
        run(model, each, ids, [LENGTH])
    assert kept_positions(cache, 0) == kept_positions(plain, 0)
    same = torch.equal(cache.enforcer.layers[0].main[0].values(), plain.enforcer.layers[0].main[0].values())
    assert same != merges


def test_without_one_of_its_two_sides_it_ranks_as_snapkv_or_by_accumulated_attention():
    torch.manual_seed(0)
    layer = LayerCache(0, 2, states=GlobalLocal.states)
    tokens = torch.randn(1, 2, 60, 4)
    layer.append(tokens, tokens, None)
    view, early = View(layer), 60 - WINDOW
    votes, received = torch.rand(2, 1, 2, 60)
    view.set_state("votes", votes)
    view.set_state("received", torch.zeros_like(received))
    local = WindowAttention(WINDOW, 7).score(view)
    torch.testing.assert_close(GlobalLocal(WINDOW, 7).score(view), local, atol=0, rtol=0)
    view.set_state("votes", torch.ones_like(votes))  # no entry above another
    view.set_state("received", received)
    found = GlobalLocal(WINDOW, 1).score(view)[..., :early]
    per_query = AccumulatedAttention().score(view)[..., :early] / (60 - torch.arange(early))
    assert found.argsort().equal(per_query.argsort())


def test_negative_candidates_are_refused():
    with pytest.raises(PolicyError, match="candidates"):
        KVCache(tiny_model("llama"), "ems(candidates=-1.0)", 64)
