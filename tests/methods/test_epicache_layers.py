"""EpiCache's layer budgets: alike keys share equally, exponents spread, floors and totals hold, cosines by plain windows."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import PolicyError
from kvbudget.models import fingerprint
from kvbudget.policy.allocators.importance import ByShift
from kvbudget.policy.artifact import Artifact
from tiny import random_text, tiny_model


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))


def test_the_more_keys_move_the_more_a_layer_gets():
    def shares(*similarity: float, alpha: float = 1.0) -> list[float]:
        return ByShift(similarity, alpha).weights([None] * len(similarity), 100.0, 1.0)

    assert shares(0.4, 0.4, 0.4) == shares(0.9, 0.1, 0.5, alpha=0.0) == [100.0] * 3
    one, two = shares(0.9, 0.1, 0.5), shares(0.9, 0.1, 0.5, alpha=2.0)
    assert one == [25.0, 183.0, 92.0] and two[0] == 25.0 and two[1] > one[1] and sum(two) == 300.0


def test_cosines_are_those_of_windows_of_keys():
    model, texts = tiny_model("llama"), [random_text(120, seed=s)[0] for s in range(2)]

    def fitted(**given: float) -> torch.Tensor:
        path = calibrate("epicache_layers", model, texts=texts, count=2, length=120, block=40, window=50, **given)
        return Artifact.load("epicache_layers", fingerprint(model), path).tensors["similarity"]

    torch.testing.assert_close(fitted(overlap=3.0), torch.ones(2), msg="every block sees the whole text")
    found, expected = fitted(overlap=0.5, sinks=2), torch.zeros(2)
    step = torch.arange(120)
    near = (step >= (step // 40 * 40 - 20)[:, None]) | (step < 2)
    plain, causal = tiny_model("llama"), step <= step[:, None]
    for ids in texts:
        keys = []
        for allowed in (causal, causal & near):
            past = DynamicCache()
            with torch.inference_mode():
                plain(ids[None], past_key_values=past, attention_mask=allowed[None, None])
            keys.append(torch.stack([layer.keys[0] for layer in past.layers])[:, :, :100].unflatten(2, (2, 50)))
        expected += torch.cosine_similarity(*(x.flatten(3) for x in keys), dim=-1).mean((1, 2)) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found[1] < 0.99 < found[0], "the first layer's keys depend on nothing but their token"
    cache = KVCache(model, "snapkv(window=8)+epicache_layers", 40)
    with torch.inference_mode():
        model(random_text(120), past_key_values=cache)
    kept = [layer[0][0] for layer in cache.report().kept]
    assert kept == [10, 70]
    with pytest.raises(PolicyError, match="window=200"):
        calibrate("epicache_layers", model, texts=texts, count=2, length=120, window=200)
