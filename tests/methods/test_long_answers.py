"""Methods that act in decode, over a thousand generated tokens: constant size, and what they promise still holds."""

import pytest
import torch
from brute import kept_positions

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from tiny import random_text, tiny_model

PROMPT, TOKENS, BUDGET = 200, 1000, 96
POLICIES = (
    "morphkv(window=16)",
    "knorm+scope(recent=16, length=400)",
    "shotkv(window=16)",
    "windowkv(window=16, group=2)",
    "roco",
    "expected_attention",
    "lacache(before=7, after=2, positions=cache)",
    "corm(window=32)",
    "fastgen",
    "h2o",
    "tova",
    "lagkv(lag=16)",
    "keydiff(recent=16)",
    "pagedeviction",
)
CALIBRATED = {
    "qfilters": "recent=16",
    "locret": "recent=16",
    "fast_kvzip": "window=16",
    "kvzap": "window=32",
    "wg_kv": "window=32",
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_tokens(policy):
    run(policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_thousand_tokens_of_calibrated_methods(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model = tiny_model("llama", max_position_embeddings=2048, num_hidden_layers=1)
    steps = {} if name in ("qfilters", "kvzap") else {"steps": 2}
    calibrate(name, model, texts=[random_text(96)[0]], count=1, length=96, **steps)
    run(f"{name}({CALIBRATED[name]})")


def run(policy):
    layers = 2 if "group" in policy else 1
    model = tiny_model("llama", max_position_embeddings=2048, num_hidden_layers=layers)
    cache = KVCache(model, policy, BUDGET)
    token = cache.prefill(model, random_text(PROMPT)).argmax(-1)
    most = []
    with torch.inference_mode():
        for step in range(TOKENS):
            token = model(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
            if step % 50 == 49:
                cache.check_integrity()
                most.append(cache.nbytes)
    assert cache.seen == [PROMPT + TOKENS] and cache.enforcer.evictions > layers * TOKENS / 32
    assert max(most[10:]) <= max(most[:10]), "the size stays what it has been"
    entries = cache.report().kept_entries
    assert entries <= BUDGET * 2 * layers
    recent = cache.parts.protect.recent
    for layer in range(layers):
        for row in kept_positions(cache, layer):
            assert row == sorted(set(row)) and row[len(row) - recent :] == list(range(1200 - recent, 1200))
            prompt = sum(position < PROMPT for position in row)
            assert cache.parts.stages is None or prompt >= len(row) // 2 - 16, "the prompt's pool is untouched"
