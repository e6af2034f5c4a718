"""Methods that act in decode, over a thousand generated tokens: constant size, and what they promise still holds."""

import pytest
import torch
from brute import kept_positions
from test_calibrated import calibrated

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.driver import revising
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.segments.retrospective import OUTPUTS
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
    "tova+cam",
    "h2o+dynamickv",
    "lagkv(lag=16)+adakv",
    "keydiff(recent=16)+cla",
    "pagedeviction",
    "knorm(recent=16)+sablock+minicache(start=0.0)",
    "prefixkv(recent=16)",
    "streaming_llm+kvcrush",
    "snapkv(window=16)+fair(cuts=(50,))",
    "mpcache(size=8)",
    "task_kv(window=16, sinks=4, recent=16)",
    "cake(window=16)+ems(window=16)",
    "chelsea(recent=16)",
    "d2o",
    "elastic_cache",
    "pyramidinfer(window=16)",
    "transformer_vq(codes=8)+kcache(top=16)",
    "lattice(slots=8)+neurocache(top=4, window=16)",
)
TWO_LAYERS = ("group=", "dynamickv", "compresskv", "prefixkv", "minicache", "cla")
CALIBRATED = {
    "qfilters": "qfilters(recent=16)",
    "expected_attention_stats": "expected_attention_stats",
    "locret": "locret(recent=16)",
    "fast_kvzip": "fast_kvzip(window=16)",
    "kvzap": "kvzap(window=32)",
    "wg_kv": "wg_kv(window=32)",
    "top_theta": "streaming_llm+top_theta",
}
FITS = {"locret": {"steps": 2}, "fast_kvzip": {"steps": 2}, "wg_kv": {"steps": 2}, "top_theta": {"k": 16, "first": 16}}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_tokens(policy):
    run(policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_thousand_tokens_of_calibrated_methods(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model = tiny_model("llama", max_position_embeddings=2048, num_hidden_layers=1)
    calibrate(name, model, texts=[random_text(96)[0]], count=1, length=96, **FITS.get(name, {}))
    run(CALIBRATED[name])


@pytest.mark.slow
def test_a_thousand_tokens_of_layers_with_shares_and_a_state(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    calibrated(max_position_embeddings=2048)
    run("compresskv(least=8)+less")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "tables", "most"),
    [
        ("razor_attention", "window=20, compression=40", {"induction": [0.9, 0.1], "echo": [0.0, 0.0]}, 4 + 1200 // 40),
        ("duo_attention", "sinks=4, recent=20", {"change": [0.9, 0.1]}, 24),
    ],
    ids=["razor_attention", "duo_attention"],
)
def test_a_thousand_tokens_of_heads_that_keep_everything(method, options, tables, most, tmp_path, monkeypatch):
    """One of two heads grows with the text; the other holds a window, or grows by a 40th of the text (RazorAttention)."""
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model = tiny_model("llama", max_position_embeddings=2048, num_hidden_layers=1)
    Artifact(method, fingerprint(model), {name: torch.tensor([row]) for name, row in tables.items()}, {}).save()
    cache = KVCache(model, f"{method}({options})")
    answer(model, cache)
    rows = kept_positions(cache, 0)
    assert rows[0] == list(range(1200)) and rows[1][:4] == [0, 1, 2, 3] and 24 - 3 <= len(rows[1]) <= most
    assert rows[1][4:] == list(range(1200 - len(rows[1]) + 4, 1200))


@pytest.mark.slow
def test_a_thousand_tokens_that_revise_earlier_ones():
    model = tiny_model("llama", max_position_embeddings=2048, num_hidden_layers=1)
    cache = KVCache(model, "retro_attention(window=2, share=0.15, dense=0)")
    with revising(model, cache):
        answer(model, cache)
    assert kept_positions(cache, 0) == [list(range(1200))] * 2, "nothing is evicted"
    assert cache.layers[0].store.statistics[OUTPUTS].shape[-2] == 1, "the stored answers are those of the window"


def run(policy):
    layers = 2 if any(part in policy for part in TWO_LAYERS) else 1
    model = tiny_model("llama", max_position_embeddings=2048, num_hidden_layers=layers)
    cache = KVCache(model, policy, BUDGET)
    most = answer(model, cache)
    stores = cache.enforcer.layers
    assert cache.enforcer.evictions > len(stores) * TOKENS / 32
    cost, heads = cache.enforcer.cost, 2 * len(stores)
    entries = heads * (
        cost.fixed + BUDGET * cost.per_entry
    )  # layers that trade entries need not have held all of them at once
    assert max(most[10:]) <= max(*most[:10], entries), "the size stays what it has been"
    assert sum(sum(map(sum, store.evictable())) for store in stores) <= BUDGET * heads
    recent = cache.parts.protect.recent
    for layer in range(len(stores)):
        for row in kept_positions(cache, layer):
            assert row == sorted(set(row)) and row[len(row) - recent :] == list(range(1200 - recent, 1200))
            prompt = sum(position < PROMPT for position in row)
            assert cache.parts.stages is None or prompt >= len(row) // 2 - 16, "the prompt's pool is untouched"


def answer(model, cache):
    """Greedy decoding; bytes that the cache holds after every 50th token."""
    token = cache.prefill(model, random_text(PROMPT)).argmax(-1)
    held = []
    with torch.inference_mode():
        for step in range(TOKENS):
            token = model(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
            if step % 50 == 49:
                cache.check_integrity()
                held.append(cache.nbytes)
    assert cache.seen == [PROMPT + TOKENS]
    return held
