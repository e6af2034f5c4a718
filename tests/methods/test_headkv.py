"""HeadKV: the whole model's budget over its heads by a table, and what each head selects."""

from pathlib import Path

import pytest
import torch
from brute import kept_positions, run

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.methods import parse
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from tiny import random_text, tiny_model

SCORES = torch.tensor([[0.1, 0.3], [0.6, 0.0], [0.2, 0.8]])


@pytest.fixture(autouse=True)
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    tensors = {"induction": SCORES, "echo": torch.ones(3, 2)}
    Artifact("razor_attention", fingerprint(tiny_model("llama", num_hidden_layers=3)), tensors, {}).save()


@pytest.mark.parametrize("beta", [1.0, 1.2, 3.0])
def test_heads_get_their_share_of_the_model(beta):
    model, ids = tiny_model("llama", num_hidden_layers=3), random_text(200)
    cache = KVCache(model, f"snapkv(window=8)+headkv(beta={beta})", 50)
    run(model, cache, ids, [200])
    kept = [layer[0] for layer in cache.report().kept]
    assert sum(map(sum, kept)) == 6 * 50
    # Beyond the window, 42 entries on average: a fixed part, and the pool by importance.
    for layer, row in enumerate(kept):
        for head, entries in enumerate(row):
            real = 42 * ((1 - 1 / beta) + 6 * float(SCORES[layer, head] / SCORES.sum()) / beta)
            assert abs(entries - 8 - real) <= 1.5


def test_equal_importances_are_uniform_and_selection_is_the_scorers():
    model, ids = tiny_model("llama", num_hidden_layers=3), random_text(150)
    caches = [KVCache(model, f"snapkv(window=8){more}", 40) for more in ("", "+headkv(importance=echo)")]
    for cache in caches:
        run(model, cache, ids, [130] + [1] * 20)
    for layer in range(3):
        assert kept_positions(caches[0], layer) == kept_positions(caches[1], layer)
    ragged = KVCache(model, "keydiff+headkv", 40)
    run(model, ragged, ids, [150])
    keys = ragged.enforcer.layers[0].main[0]
    assert keys.lengths[1] > keys.lengths[0]


def test_short_heads_give_their_excess_to_others():
    model = tiny_model("llama", num_hidden_layers=3)
    cache = KVCache(model, "snapkv(window=8)+headkv(beta=1.0)", 50)
    run(model, cache, random_text(70), [70])
    kept = [layer[0] for layer in cache.report().kept]
    assert sum(map(sum, kept)) == 300 and max(map(max, kept)) == 70 and kept[1][1] >= 8


def test_impossible_parameters_are_refused():
    with pytest.raises(PolicyError, match="beta="):
        parse("headkv(beta=0.5)")
    with pytest.raises(PolicyError, match="calibrate razor_attention"):
        KVCache(tiny_model("llama", seed=3), "headkv", 64)
