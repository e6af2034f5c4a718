"""Attention with a selector: reading everything is plain attention, on every path that entries can come from."""

import pytest
import torch
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.policy.base import Selector
from kvbudget.segments.selective import Chosen, Reading
from tiny import in_chunks, left_padded, own_model, random_text, served_model


class Everything(Selector):
    """Full attention, and a note of the shapes seen."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def select(self, reading: Reading) -> Chosen:
        self.shapes.append(tuple(reading.logits.shape))
        assert reading.logits.shape[3] == reading.visible.shape[2]
        return Chosen(reading.probabilities)


def served(name: str, policy: str = "full", **options: object) -> tuple[KVCache, Everything]:
    cache, everything = KVCache(served_model(name), policy, **options), Everything()
    for layer in cache.enforcer.layers:
        layer.selector = everything
    return cache, everything


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("chunk", [70, 13, 1])
def test_reading_everything_is_plain_attention(name, chunk):
    ids = random_text(40 if chunk == 1 else 70)
    cache, everything = served(name)
    with torch.inference_mode():
        expected = own_model(name)(ids).logits
        found = in_chunks(served_model(name), ids, cache, chunk)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert everything.shapes and everything.shapes[-1][-1] == ids.shape[1]
    cache.check_integrity()


def test_padded_rows_and_blocks_of_queries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvbudget.segments.selective.BLOCK", 2000)
    texts = [random_text(n, seed=n) for n in (20, 60)]
    ids, mask = left_padded(texts)
    cache, everything = served("llama")
    with torch.inference_mode():
        found = in_chunks(served_model("llama"), ids, cache, 25, mask)
        for b, text in enumerate(texts):
            expected = own_model("llama")(text).logits
            torch.testing.assert_close(found[b : b + 1, -text.shape[1] :], expected, atol=2e-4, rtol=0)
    assert max(shape[3] for shape in everything.shapes) < 25


@pytest.mark.parametrize("policy", ["kivi(residual=32)", "snapkv(window=8)", "d2o", "h2o+adakv"])
def test_entries_of_every_kind_are_read(policy):
    """Coded entries, ragged heads, merged entries and mean entries with a count: as without a selector."""
    ids: Tensor = random_text(150)
    budget = None if policy.startswith("kivi") else 40
    plain = KVCache(served_model("llama"), policy, budget)
    cache, _ = served("llama", policy, budget=budget)
    with torch.inference_mode():
        expected, found = (
            torch.cat(
                [
                    in_chunks(served_model("llama"), ids[:, :130], c, 65),
                    in_chunks(served_model("llama"), ids[:, 130:], c, 1),
                ],
                1,
            )
            for c in (plain, cache)
        )
    torch.testing.assert_close(found, expected, atol=5e-4 if budget else 5e-2, rtol=0)
