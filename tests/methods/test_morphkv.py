"""MorphKV against brute force, over many steps, and what the window forgets."""

import pytest
import torch
from brute import Brute, kept_positions, run, with_newest

from kvbudget.cache import KVCache
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


class Morph:
    """Attention rows of the last ``window`` queries over whatever was held then, looked up for whatever is held now."""

    def __init__(self, window, fusion, length):
        self.window, self.fusion, self.length, self.rows = window, fusion, length, {}

    def __call__(self, step, limit):
        kept = []
        for head, weights in zip(step.heads, step.weights, strict=True):
            rows = self.rows.setdefault(id(head), [])
            for query in weights.transpose(0, 1):
                row = torch.full((self.length,), float("-inf")).double()
                row[head.positions] = query.log().sum(0)  # a softmax of summed logits is a product of softmaxes
                rows.append(row)
            del rows[: -self.window]
            older = head.positions < step.seen - self.window
            scores = torch.zeros(len(head.positions)).double()
            if bool(older.any()):
                found = torch.stack([row[head.positions[older]].softmax(-1) for row in rows])
                scores[older] = found.sum(0) if self.fusion == "sum" else found.amax(0)
            kept.append(with_newest(scores, head.positions, step.seen - self.window, limit))
        return kept


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("fusion", ["sum", "max"])
def test_recent_queries_choose_at_every_step(heads, fusion):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, f"morphkv(window=8, fusion={fusion}, every=1)", 40)
    run(model, cache, random_text(150), [70, 30] + [1] * 50, Brute(Morph(8, fusion, 150), 40))
    assert cache.report().kept == [[[40] * heads[1]]] * 2


def test_one_query_of_one_head_chooses_as_snapkv():
    """Its softmax leaves the window out, which scales a query's weights; with one query and no group that is all."""
    model, ids = tiny_model("llama", num_attention_heads=2), random_text(120)
    kept = []
    for policy in ("morphkv(window=1)", "snapkv(window=1, kernel=1)"):
        cache = KVCache(model, policy, 30)
        run(model, cache, ids, [120])
        kept.append([kept_positions(cache, layer) for layer in range(2)])
    assert kept[0] == kept[1]


def test_soft_caps():
    model = tiny_model("gemma2")
    cache = KVCache(model, "morphkv(window=8)", 60)
    cache.prefill(model, random_text(100))
    store = cache.enforcer.layers[0]
    capped = cache.parts.scorer.score(View(store))
    assert store.statistics["softcap"].unique().tolist() == [5.0]
    store.statistics["softcap"] = torch.zeros_like(store.statistics["softcap"])
    assert not torch.allclose(capped, cache.parts.scorer.score(View(store)))


def test_what_nobody_looks_at_for_a_window_leaves():
    """An entry that the newest queries ignore goes, whatever it was worth before."""
    model, ids = tiny_model("llama"), random_text(120)
    cache = KVCache(model, "morphkv(window=8, every=1)", 30)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        first = set(kept_positions(cache, 1)[0])
        for token in random_text(40, seed=1)[0]:
            model(token.view(1, 1), past_key_values=cache)
    assert len(first & set(kept_positions(cache, 1)[0])) < 22, "the older entries have been chosen anew"


def test_its_queries_are_counted():
    model = tiny_model("llama")
    cache = KVCache(model, "morphkv(window=8)", "40KiB")
    with torch.inference_mode():
        model(random_text(300), past_key_values=cache)
    cache.check_integrity()
    assert cache.enforcer.cost.fixed == 4 * (8 * 2 * 16 + 1)
    assert cache.nbytes > 0.95 * 40 * 1024
