"""WindowKV: whole windows, shared by the heads of a layer and by groups of layers, against brute force."""

import pytest
import torch
from brute import kept_positions

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.methods.windowkv import PyramidOfGroups
from kvbudget.policy.scorers.windowed import LayerWindowAttention
from kvbudget.policy.selection import best_of_units
from tiny import left_padded, random_text, tiny_model

POLICY = "windowkv(window=8, width=4, group=2, strategy={})"


def expected(votes, count, strategy, window=8, width=4):
    """Kept positions of a layer from the votes ``[Hkv, T]`` of its last queries, when ``count`` entries may stay."""
    length = votes.shape[1] - window
    ranges = [range(begin, min(begin + width, length)) for begin in range(0, length, width)]
    top = {"average": lambda row: row.mean(), "max": lambda row: row.topk(min(len(row), width // 2)).values.mean()}
    scores = [sum(top[strategy](row[list(span)]) for row in votes) for span in ranges]
    kept, room = [], count - window
    for i in sorted(range(len(ranges)), key=lambda i: -scores[i]):
        if len(ranges[i]) <= room:
            kept, room = kept + list(ranges[i]), room - len(ranges[i])
    return sorted(kept) + list(range(length, length + window))


@pytest.mark.parametrize("strategy", ["average", "max"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_windows_by_the_first_layer_of_the_group(strategy, heads):
    model = tiny_model("llama", num_hidden_layers=4, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    ids = random_text(123)
    cache = KVCache(model, POLICY.format(strategy), 50)
    cache.prefill(model, ids)
    cache.check_integrity()
    shares = cache.enforcer.shares(0)
    assert shares[0] == shares[1] > shares[2] == shares[3] and sum(shares) <= 50 * 4 * heads[1]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True).attentions
    for layer in range(4):
        rows = attentions[layer // 2 * 2][0, :, -8:].double().sum(1)
        votes = rows.unflatten(0, (heads[1], -1)).mean(1)
        count = shares[layer] // heads[1]
        assert kept_positions(cache, layer) == [expected(votes, count, strategy)] * heads[1]


def test_windows_of_one_position_are_snapkv_without_pooling():
    model, ids = tiny_model("llama", num_attention_heads=3, num_key_value_heads=1), random_text(100)
    kept = []
    for policy in ("windowkv(window=8, width=1, group=1, beta=1)", "snapkv(window=8, kernel=1)"):
        cache = KVCache(model, policy, 40)
        cache.prefill(model, ids)
        kept.append([kept_positions(cache, layer) for layer in range(2)])
    assert kept[0] == kept[1]


def test_followers_neither_look_nor_remember():
    model, seen = tiny_model("llama", num_hidden_layers=4), []
    cache = KVCache(model, POLICY.format("average"), 50)
    scorer, observe = cache.parts.scorer, LayerWindowAttention.observe
    object.__setattr__(scorer, "observe", lambda view: (seen.append(view.layer_idx), observe(scorer, view)))
    with torch.inference_mode():
        model(random_text(100), past_key_values=cache)
        for token in random_text(60, seed=1)[0]:
            model(token.view(1, 1), past_key_values=cache)
            cache.check_integrity()
    assert set(seen) == {0, 2} and not cache.enforcer._chosen
    assert kept_positions(cache, 0) == kept_positions(cache, 1) and kept_positions(cache, 2) == kept_positions(cache, 3)
    share = cache.enforcer.shares(0)[0] // 2
    assert all(len(row) <= share and row[-8:] == list(range(152, 160)) for row in kept_positions(cache, 0))


def test_padded_sequences_equal_their_single_runs():
    model, texts = tiny_model("llama"), [random_text(100, seed=1), random_text(57, seed=2)]
    ids, mask = left_padded(texts)
    batch = KVCache(model, POLICY.format("max"), 36)
    batch.prefill(model, ids, attention_mask=mask)
    for b, text in enumerate(texts):
        single = KVCache(model, POLICY.format("max"), 36)
        single.prefill(model, text)
        assert [kept_positions(batch, i, b) for i in range(2)] == [kept_positions(single, i) for i in range(2)]


def test_budgets_of_groups():
    """Card: with g layers per group the last group selects g / beta of the mean, the first 2 - g / beta, linear between."""
    weights = PyramidOfGroups(14 / 8, 8).weights([None] * 24, 100, 17)
    torch.testing.assert_close(torch.tensor(weights[::8]), torch.tensor([2 - 8 / 14, 1.0, 8 / 14]))
    assert all(len(set(weights[i : i + 8])) == 1 for i in (0, 8, 16))


def test_the_better_half_of_a_unit():
    scores = torch.tensor([[[1.0, 5.0, 3.0, 0.0, 7.0, 2.0]]])
    units = torch.tensor([[[0, 0, 0, 0, 3, 3]]])
    assert best_of_units(scores, units, 2).tolist() == [[[4.0, 4.0, 4.0, 4.0, 4.5, 4.5]]]


def test_refusals():
    with pytest.raises(PolicyError, match="windowkv keeps the same entries in all heads"):
        KVCache(tiny_model("llama"), "windowkv+adakv", 50)
    with pytest.raises(PolicyError, match="must be at least 1"):
        KVCache(tiny_model("llama"), "windowkv(width=0)", 50)
