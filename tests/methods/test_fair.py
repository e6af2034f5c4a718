"""Fair eviction: quotas of spans, votes at each span's end, and the whitelist."""

from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, best, kept_positions, run
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvbudget.cache import KVCache
from kvbudget.errors import BudgetError, PolicyError
from tiny import random_text, tiny_model


def within_spans(cuts: Sequence[int], window: int, kernel: int = 5):
    """The reference's form for one forward over the whole prompt: each span's last queries judge the span, quotas by floor."""

    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        kept = []
        length = step.seen
        edges = list(zip([0, *cuts], [*cuts, length], strict=True))
        quotas, before = [], 0
        for _, end in edges:
            quotas.append(limit * end // length - before)
            before += quotas[-1]
        width = window // len(edges)
        for head, weights in zip(step.heads, step.weights, strict=True):
            assert len(head.positions) == length, "one forward"
            chosen = []
            for (begin, end), quota in zip(edges, quotas, strict=True):
                rows = weights[:, end - width : end, begin : end - width].mean((0, 1))
                scores = avg_pool1d(rows[None], kernel, stride=1, padding=kernel // 2)[0]
                scores = torch.cat([scores, scores.max().repeat(width)])
                if end == length:  # the newest are protected
                    scores[-width:] = float("inf")
                chosen.append(begin + best(scores, quota))
            kept.append(torch.cat(chosen))
        return kept

    return rule


@pytest.mark.parametrize("cuts", [(70,), (40, 90), ()], ids=len)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_spans_are_judged_by_their_own_ends(cuts, heads):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, f"fair(cuts={cuts}, window=24)", 50)
    run(model, cache, random_text(150), [150], Brute(within_spans(cuts, 24), 50))


@pytest.mark.parametrize("text", ["knorm", "snapkv(window=8)", "h2o", "streaming_llm"])
def test_every_span_keeps_the_same_share(text):
    model, ids = tiny_model("llama"), random_text(200)
    edges = [(0, 60), (60, 110), (110, 200)]
    cache = KVCache(model, f"{text}+fair(cuts=(60, 110))", 80)
    run(model, cache, ids, [200])
    for layer in range(2):
        for row in kept_positions(cache, layer):
            assert len(row) == 80
            for begin, end in edges:
                # Protected entries may exceed a quota: streaming_llm's recency and h2o's recent share do not here.
                share = sum(begin <= p < end for p in row) / (end - begin)
                if text in ("knorm", "snapkv(window=8)"):
                    assert abs(share - 0.4) <= 1 / (end - begin) + 1e-9
                assert share > 0


def test_one_span_is_the_scorer_alone():
    model, ids = tiny_model("llama"), random_text(160)
    for text in ("knorm", "snapkv(window=8)"):
        fair, plain = KVCache(model, f"{text}+fair", 40), KVCache(model, text, 40)
        logits = [run(model, cache, ids, [148] + [1] * 12) for cache in (fair, plain)]
        assert logits[0].equal(logits[1])


def test_quotas_go_on_while_decoding_and_protection_comes_first():
    model = tiny_model("llama")
    cache = KVCache(model, "streaming_llm(sinks=30)+fair(cuts=(100,))", 60, protect=[(120, 130)])
    run(model, cache, random_text(166), [150] + [1] * 16)
    for layer in range(2):
        for row in kept_positions(cache, layer):
            assert set(range(30)) <= set(row) and set(range(120, 130)) <= set(row) and len(row) <= 60


def test_whitelisted_positions_stay_inside_the_budget():
    model = tiny_model("llama")
    marked = [(20, 30), (60, 75)]
    cache = KVCache(model, "knorm+fair(cuts=(50,))", 60, protect=marked)
    run(model, cache, random_text(164), [150] + [1] * 14)
    for layer in range(2):
        for row in kept_positions(cache, layer):
            assert len(row) <= 60 and all(set(range(*span)) <= set(row) for span in marked)
    with pytest.raises(BudgetError, match="25 marked tokens"):
        KVCache(model, "knorm+fair(cuts=(50,))", 20, protect=marked)


@pytest.mark.parametrize("text", ["fair(cuts=(50, 20))", "fair(cuts=(0, 20))", "fair(cuts=(5, 9), window=2)"])
def test_impossible_parameters_are_refused(text):
    with pytest.raises(PolicyError, match="fair"):
        KVCache(tiny_model("llama"), text, 64)
