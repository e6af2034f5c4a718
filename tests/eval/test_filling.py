"""Filling caches of one context together: the same as each alone, though much is computed once."""

import pytest
import torch

from kvbudget import KVCache
from kvbudget.driver import revising
from kvbudget.eval.filling import Filler
from kvbudget.eval.matrix import every_policy
from kvbudget.eval.replay import record
from kvbudget.eval.tasks.base import Probe, read, read_together
from kvbudget.methods import parse
from test_cli import tiny_tokenizer
from tiny import random_text, tiny_model

BUDGETS = ("50%", "30%")
TOKENS = 300


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = random_text(TOKENS)
    return model, tokenizer, ids, record(model, ids)


@pytest.mark.parametrize("policy", [name for name in every_policy() if parse(name).parts().replayable])
def test_caches_that_share_work_equal_separate_prefills(setting, policy: str) -> None:
    model, tokenizer, ids, recording = setting
    filler = Filler(model, tokenizer, recording)
    parts = parse(policy).parts()
    # Where nothing leaves before the last layer, or between chunks, layers that were shared have less spare room.
    late = parts.plan is not None or (parts.layers is not None and parts.layers.joint)
    for budget in BUDGETS if parts.scorer is not None or parts.plan is not None else (None,):
        shared, alone = (KVCache(model, policy, budget, max_length=TOKENS) for _ in range(2))
        seconds = filler.fill(shared)
        # Under a plan some passes are shared too; the last logits need not be.
        alone.prefill(model, ids, tokenizer=tokenizer)
        assert seconds > 0
        assert shared.report().kept == alone.report().kept
        assert shared.nbytes == alone.nbytes
        assert 0 <= alone.peak_bytes - shared.peak_bytes <= alone.peak_bytes / 8 * late
        for one, other in zip(shared.layers, alone.layers, strict=True):
            for a, b in zip(one.store.segments, other.store.segments, strict=True):
                assert torch.equal(a.positions(), b.positions())
                assert torch.allclose(a.values(), b.values(), atol=1e-4)
        shared.check_integrity()


def test_what_is_shared_is_computed_once(setting, monkeypatch) -> None:
    model, tokenizer, _, recording = setting
    forwards = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: forwards.append(1) or forward(*a, **k))
    decoder = type(model.get_decoder())
    whole = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *a, **k: forwards.append(1) or whole(*a, **k))
    filler = Filler(model, tokenizer, recording)
    for policy, passes in (("snapkv", 0), ("kvzip", 1), ("kvcompose", 1)):
        forwards.clear()
        times = [filler.fill(KVCache(model, policy, budget, max_length=TOKENS)) for budget in BUDGETS]
        assert len(forwards) == passes
        # What a cache was spared counts, so that no budget looks cheaper than another.
        spared = [known.seconds for known in filler._known.values()]
        assert all(spared) and times[1] > sum(spared)


def test_caches_read_together_answer_as_each_alone(setting) -> None:
    model, tokenizer, _, recording = setting
    filler = Filler(model, tokenizer, recording)
    policies = [
        ("full", None),
        ("snapkv", "30%"),
        ("kvzip", "30%"),
        ("streaming_llm(positions=cache)", 40),
        ("kivi", None),
    ]
    caches = [KVCache(model, policy, budget, max_length=TOKENS) for policy, budget in policies]
    for cache in caches:
        filler.fill(cache)
    held = [cache.fork().nbytes for cache in caches]
    probe = Probe(random_text(3, seed=4)[0], random_text(20, seed=5)[0], skip=4)
    for cache, mine in zip(caches, read_together(model, caches, probe), strict=True):
        alone = read(model, cache, probe)
        assert torch.equal(mine.targets, alone.targets)
        assert torch.allclose(mine.logits, alone.logits, atol=1e-5)
    assert held == [cache.nbytes for cache in caches]


@pytest.mark.parametrize(
    "policy", ["kcache(top=3)", "mpcache", "retro_attention(window=2, share=0.2, page=4, dense=0)"]
)
def test_what_acts_in_decoding_alone_is_read_as_in_decoding(setting, policy: str) -> None:
    model, tokenizer, _, recording = setting
    cache = KVCache(model, policy, "30%" if policy == "mpcache" else None, max_length=TOKENS)
    Filler(model, tokenizer, recording).fill(cache)
    probe = Probe(random_text(20, seed=4)[0], random_text(19, seed=5)[0], skip=2)
    fork, ids = cache.fork(), torch.cat([probe.question, probe.answer])[None]
    with torch.inference_mode(), revising(model, fork):
        rows = [model(ids[:, :19], past_key_values=fork).logits[0]]
        # What is revised comes once more, before the new token.
        rows += [model(ids[:, i : i + 1], past_key_values=fork).logits[0, -1:] for i in range(19, 38)]
    expected = torch.cat(rows)[-17:]
    (mine,) = read_together(model, [cache], probe)
    assert torch.allclose(mine.logits, expected, atol=1e-4)
