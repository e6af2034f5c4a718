"""Neurocache: neighbors by plain loops, lower layers and prefills left alone, exact where the window holds the text."""

import pytest
import torch

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.policy.selectors.neighbors import Neighbors
from kvbudget.segments.selective import Reading
from tiny import left_padded, random_text, tiny_model

RULE = Neighbors(top=3, followers=2, context=2, window=6, sinks=2, start=0.5, cache=20)


def reading(depth: float, entries: int = 40) -> Reading:
    """One sequence, two KV heads of three query heads, the two newest tokens."""
    torch.manual_seed(entries)
    query, keys, values = torch.randn(1, 2, 3, 2, 8), torch.randn(1, 2, entries, 8), torch.randn(1, 2, entries, 5)
    visible = torch.arange(entries) <= torch.tensor([entries - 2, entries - 1])[:, None]
    visible = visible[None, None].expand(1, 2, -1, -1)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", query, keys).masked_fill(~visible[:, :, None], float("-inf"))
    return Reading(0, query, keys, values, logits, logits.logsumexp(-1), visible, depth)


def test_the_entries_read_are_those_of_plain_loops():
    asked = reading(0.75)
    weights = RULE.select(asked).weights
    for head in range(2):
        states = [(v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() for v in asked.values[0, head]]
        for i, own in enumerate((38, 39)):
            old = [t for t in range(2, own - 5) if t > own - 26]
            read = {0, 1, *range(own - 5, own + 1)}
            for token in (own, own - 1):
                order = sorted(old, key=lambda t: float((states[t] - states[token]).square().sum()))
                read |= {t + behind for t in order[:3] for behind in (0, 1)}
            full = asked.logits[0, head, :, i].softmax(-1)
            expected = torch.zeros_like(full)
            expected[:, sorted(read)] = full[:, sorted(read)]
            torch.testing.assert_close(weights[0, head, :, i], expected / expected.sum(-1, keepdim=True))
    lower = reading(0.25)
    torch.testing.assert_close(RULE.select(lower).weights, lower.logits.softmax(-1))


def test_generated_tokens_alone_read_less_and_a_wide_window_is_exact():
    model, ids = tiny_model("llama"), random_text(90)
    with torch.inference_mode():
        expected = model(ids).logits
        for policy, same in (("neurocache(top=2, window=8)", False), ("neurocache(window=90)", True)):
            cache = KVCache(model, policy)
            first = model(ids[:, :80], past_key_values=cache).logits
            torch.testing.assert_close(first, expected[:, :80], atol=1e-4, rtol=0)
            rest = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(80, 90)], 1)
            assert torch.allclose(rest, expected[:, 80:], atol=1e-4) is same
    for wrong in ("top=0", "start=2.0", "sinks=-1"):
        with pytest.raises(PolicyError, match=wrong):
            KVCache(model, f"neurocache({wrong})")


def test_rows_that_differ_in_length_have_no_gaps_where_a_fork_goes_on():
    """What a fork adds lies in a segment of its own, behind the longest row; tokens that follow each other still do."""
    model, policy = tiny_model("llama"), "neurocache(top=2, window=8, start=0, sinks=2)"
    ids, mask = left_padded([random_text(40), random_text(70, seed=1)])
    plain = KVCache(model, policy)
    with torch.inference_mode():
        model(ids, past_key_values=plain, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        fork = plain.fork()
        for token in random_text(4, rows=2).split(1, dim=1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            options = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, -1:] - 1}
            expected, found = (model(token, past_key_values=cache, **options).logits for cache in (plain, fork))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
