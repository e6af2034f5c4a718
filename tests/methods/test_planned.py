"""Methods with a plan or a driver under the registry's properties: exact where all fits, rows, head groups, all budgets."""

from contextlib import nullcontext

import pytest
import torch
from brute import kept_positions
from test_registry import check
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.driver import revising
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.methods import registry
from residency import model_tensors, resident_tensors
from tiny import left_padded, random_text, tiny_model

POLICIES = {
    "kvzip": "kvzip(chunk=50)",
    "kvcompose": "kvcompose",
    "finch": "finch(window=8, chunk=1000)",
    "laq": "laq(window=8, tokens=3)",
    "epicache": "epicache(block=200, episodes=2, window=10, medoids=3)",
    "retro_attention": "retro_attention(window=2, page=4, dense=0, share=0.5)",
}
STEPS = 4


def test_every_one_of_them_is_here():
    assert set(POLICIES) == {name for name, kind in registry().items() if {"plan", "driver"} & {*kind.needs}}


def decode(model: PreTrainedModel, cache: KVCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """A prompt by the method's plan and `STEPS` given tokens, everything checked after each; logits of the last columns."""
    known = [*model_tensors(model), *resident_tensors(cache.policy)]
    driven = revising(model, cache) if "retro" in str(cache.policy) else nullcontext()
    with driven:
        logits = [cache.prefill(model, ids, attention_mask=mask)]
        check(cache, known)
        for step in range(STEPS):
            options = {}
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                options = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            token = random_text(1, seed=step).expand(len(ids), 1)
            with torch.inference_mode():
                logits.append(model(token, past_key_values=cache, **options).logits[:, -1])
            check(cache, known)
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("heads", [(3, 3), (3, 1), (8, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("name", POLICIES)
def test_all_head_groups_and_exact_where_everything_fits(name, heads):
    model, ids = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1]), random_text(100)
    whole = KVCache(model, POLICIES[name], 400)
    logits = decode(model, whole, ids)
    assert whole.enforcer.evictions == 0 and whole.report().kept_entries == whole.report().seen_entries
    if whole.policy.lossless_when_fits:
        torch.testing.assert_close(logits, decode(model, KVCache(model, "full"), ids), atol=1e-4, rtol=0)
    if name != "retro_attention":  # which evicts nothing
        small = KVCache(model, POLICIES[name], 40)
        assert bool(decode(model, small, ids).isfinite().all()) and small.enforcer.evictions > 0


@pytest.mark.parametrize("name", POLICIES)
def test_padded_rows_equal_their_single_runs(name):
    model, texts = tiny_model("llama"), [random_text(n, seed=n) for n in (60, 110, 97)]
    budget = 400 if name == "retro_attention" else 40
    batch = KVCache(model, POLICIES[name], budget)
    logits = decode(model, batch, *left_padded(texts))
    for b, text in enumerate(texts):
        single = KVCache(model, POLICIES[name], budget)
        torch.testing.assert_close(logits[b : b + 1], decode(model, single, text), atol=1e-4, rtol=0)
        for layer in range(2):
            assert kept_positions(batch, layer, b) == kept_positions(single, layer)


@pytest.mark.parametrize("name", POLICIES)
def test_tiny_budgets_are_kept_or_refused(name):
    model, ids, kept = tiny_model("llama"), random_text(60), []
    for budget in (1, 5, 17, 48, "100B", "3KiB", "48KiB", "0.5%"):
        try:
            decode(model, KVCache(model, POLICIES[name], budget), ids)
        except (BudgetError, PolicyError) as error:
            assert any(remedy in str(error) for remedy in ("give", "drop", "state the budget")), error
            continue
        kept.append(budget)
    assert "100B" not in kept and (48 in kept or name == "retro_attention")
