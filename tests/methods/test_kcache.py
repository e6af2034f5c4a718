"""KCache: the heaviest values by plain sorting, the bound on what is lost, and prefill left alone."""

import pytest
import torch

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.methods.kcache import HeaviestValues
from kvbudget.segments.selective import Reading
from tiny import random_text, tiny_model


def reading(entries: int, layer_idx: int = 0) -> tuple[Reading, torch.Tensor]:
    torch.manual_seed(entries)
    query, keys = torch.randn(1, 2, 3, 2, 8), torch.randn(1, 2, entries, 8)
    visible = torch.arange(entries) <= torch.tensor([entries - 2, entries - 1])[:, None]
    visible = visible[None, None].expand(1, 2, -1, -1)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", query, keys).masked_fill(~visible[:, :, None], float("-inf"))
    values = torch.randn(1, 2, entries, 8)
    return Reading(layer_idx, query, keys, values, logits, logits.logsumexp(-1), visible), values


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_heaviest_weights_are_read_and_the_loss_is_bounded(renormalize):
    asked, values = reading(40)
    weights = HeaviestValues(6, renormalize).select(asked).weights
    full = asked.logits.softmax(-1)
    for found, row in zip(weights.flatten(0, 3), full.flatten(0, 3), strict=True):
        expected = torch.zeros(40)
        for at in sorted(range(40), key=lambda t: -row[t])[:6]:
            expected[at] = row[at]
        torch.testing.assert_close(found, expected / expected.sum() if renormalize else expected)
    if not renormalize:
        lost = torch.einsum("bhgnt,bhtd->bhgnd", full - weights, values).norm(dim=-1)
        assert bool((lost <= (1 - weights.sum(-1)) * values.norm(dim=-1).max() + 1e-6).all())


def test_all_values_and_exempt_layers_are_exact():
    asked, _ = reading(40)
    for selector in (HeaviestValues(40), HeaviestValues(1, exempt=1)):
        torch.testing.assert_close(selector.select(asked).weights, asked.logits.softmax(-1))
    assert int((HeaviestValues(1).select(asked).weights > 0).sum()) == 2 * 3 * 2


def test_generated_tokens_alone_read_less():
    model, ids = tiny_model("llama"), random_text(90)
    with torch.inference_mode():
        expected = model(ids).logits
        cache, all_of_it = KVCache(model, "kcache(top=3)"), KVCache(model, "kcache(top=90)")
        torch.testing.assert_close(
            model(ids[:, :80], past_key_values=cache).logits, expected[:, :80], atol=1e-4, rtol=0
        )
        model(ids[:, :80], past_key_values=all_of_it)
        few = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(80, 90)], 1)
        same = torch.cat([model(ids[:, i : i + 1], past_key_values=all_of_it).logits for i in range(80, 90)], 1)
    torch.testing.assert_close(same, expected[:, 80:], atol=1e-4, rtol=0)
    assert not torch.allclose(few, expected[:, 80:], atol=1e-2)
    with pytest.raises(PolicyError, match="top=0"):
        KVCache(model, "kcache(top=0)")
