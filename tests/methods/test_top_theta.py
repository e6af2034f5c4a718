"""Top-Theta: thresholds against quantiles, selection and compensation against the formulas."""

from pathlib import Path

import pytest
import torch
from brute import run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import PolicyError
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Selector
from kvbudget.policy.selectors.thresholds import Thresholds
from kvbudget.segments.selective import Reading
from tiny import random_text, tiny_model


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    return tmp_path


def reading(length: int = 50, layer_idx: int = 2) -> Reading:
    """Two sequences, two KV heads of two query heads, three queries that see 48, 49 and 50 entries."""
    logits = 2 * torch.randn(2, 2, 2, 3, length, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(2, 2, 3, length, dtype=torch.bool).tril(length - 3)
    logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    empty, held = torch.zeros(2, 2, 2, 3, 4), torch.zeros(2, 2, length, 4)
    return Reading(layer_idx, empty, held, held, logits, logits.logsumexp(-1), visible)


def table(value: float) -> dict[str, Tensor]:
    return {"lengths": torch.tensor([20, 50]), "thresholds": torch.tensor([100.0, value]).repeat(3, 4, 1)}


def test_rows_up_to_k_are_dense():
    given = reading()
    for selector, layer in ((Thresholds(k=50, **table(0.5)), 2), (Thresholds(k=5, first=50, **table(0.5)), 1)):
        given = reading(layer_idx=layer)
        chosen = selector.select(given)
        torch.testing.assert_close(chosen.weights, given.probabilities)
        assert chosen.mean_weight.abs().max() < 1e-5
    assert (Thresholds(k=5, first=50, **table(0.5)).select(reading()).weights == 0).any()


def test_weights_above_the_threshold_and_the_missing_mass():
    given = reading()
    chosen = Thresholds(k=5, **table(0.03)).select(given)
    p = given.logits.softmax(-1)
    expected = torch.where(p > 0.03, p, 0.0)
    torch.testing.assert_close(chosen.weights, expected)
    torch.testing.assert_close(chosen.weights.sum(-1) + chosen.mean_weight, torch.ones(2, 2, 2, 3))
    assert Thresholds(k=5, mean_value=False, **table(0.03)).select(given).mean_weight is None


@pytest.mark.parametrize("denominator", ["exact", "threshold", "none"])
def test_denominators_on_logits(denominator):
    given = reading()
    chosen = Thresholds(k=5, logits=True, denominator=denominator, **table(1.5)).select(given)
    read = given.logits > 1.5
    kept = torch.where(read, given.logits.double().exp(), 0.0)
    dropped = (given.visible[:, :, None] & ~read).double()
    total = {
        "exact": given.logits.double().exp().sum(-1),
        "threshold": kept.sum(-1) + dropped.sum(-1) * torch.tensor(1.5).double().exp(),
        "none": kept.sum(-1),
    }[denominator]
    torch.testing.assert_close(chosen.weights.double(), kept / total[..., None], atol=1e-6, rtol=1e-4)
    if denominator == "exact":
        torch.testing.assert_close(chosen.weights[chosen.weights > 0], given.probabilities[chosen.weights > 0])


def fitted(model, on: str = "weights", **options: object) -> dict[str, Tensor]:
    texts = [random_text(160, seed=s)[0] for s in range(4)]
    settings = {"count": 4, "length": 160, "k": 16, "first": 16, "step": 32, "sigma": 0.5} | options
    path = calibrate("top_theta", model, texts=texts, on=on, **settings)
    return dict(Artifact.load("top_theta", fingerprint(model), path).tensors)


@pytest.mark.parametrize("on", ["weights", "logits"])
def test_thresholds_are_quantiles_of_rows(on):
    model = tiny_model("llama", num_hidden_layers=1)
    found = fitted(model, on)
    samples: dict[tuple[int, int], list[float]] = {}
    for s in range(4):
        cache = KVCache(model, "full")
        calls = []
        attend = cache.attend
        cache.attend = lambda index, call, *args, attend=attend, calls=calls: (
            calls.append(call),
            attend(index, call, *args),
        )[1]
        run(model, cache, random_text(160, seed=s), [160])
        call = calls[0]
        keys = call.key[0].double().repeat_interleave(2, dim=0)
        logits = call.query[0].double() @ keys.transpose(-1, -2) * call.scale
        for n in range(17, 161):
            rows = logits[:, n - 1, :n]
            rows = rows if on == "logits" else rows.softmax(-1)
            least = rows.quantile(1 - 16 / n, dim=-1, interpolation="lower")
            near = min(range(5), key=lambda i: (abs(32 * (i + 1) - n), i))
            for h in range(4):
                samples.setdefault((h, near), []).append(float(least[h]))
    for (h, i), values in samples.items():
        x = torch.tensor(values).double()
        expected = x.mean() + 0.5 * x.std(correction=0)
        assert float(found["thresholds"][0, h, i]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_about_k_entries_are_read_of_new_text():
    model = tiny_model("llama")
    fitted(model, sigma=0.0)
    cache = KVCache(model, "top_theta")
    counts: list[float] = []
    selector = cache.enforcer.layers[1].selector

    class Counting(Selector):
        def select(self, given: Reading):
            chosen = selector.select(given)
            counts.append(float((chosen.weights > 0).sum(-1).float()[..., 100:].mean()))
            return chosen

    cache.enforcer.layers[1].selector = Counting()
    run(model, cache, random_text(160, seed=99), [160])
    assert 0.7 * 16 < counts[0] < 1.3 * 16


def test_text_goes_through_it_and_another_calibration_is_refused():
    model, ids = tiny_model("llama"), random_text(120)
    fitted(model)
    full, sparse = (run(model, KVCache(model, p), ids, [112] + [1] * 8) for p in ("full", "top_theta"))
    assert sparse[:, :16].allclose(full[:, :16], atol=1e-4) and not sparse.allclose(full, atol=1e-2)
    bare = run(model, KVCache(model, "top_theta(mean_value=False)"), ids, [112] + [1] * 8)
    assert not bare.allclose(sparse, atol=1e-3)
    both = KVCache(model, "snapkv(window=8)+top_theta", 40)
    run(model, both, ids, [112] + [1] * 8)
    assert both.enforcer.evictions > 0
    with pytest.raises(PolicyError, match="calibrated on weights, not on logits"):
        KVCache(model, "top_theta(on=logits)")
    with pytest.raises(PolicyError, match="positions inside the cache"):
        KVCache(model, "streaming_llm(positions=cache)+top_theta", 40)
    with pytest.raises(PolicyError, match="more than k tokens"):
        fitted(model, k=160)
