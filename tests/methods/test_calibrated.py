"""Calibrated methods under the registry's properties: padded rows equal single runs, byte budgets hold, forks go on alike."""

from pathlib import Path

import pytest
import torch
from brute import kept_positions
from test_less import weights as state_weights
from test_registry import feed
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.moments import triangle
from tiny import left_padded, random_text, tiny_model

POLICIES = (
    "qfilters(recent=8)",
    "expected_attention_stats",
    "compresskv(least=8)",
    "snapkv(window=8)+top_theta",
    "snapkv(window=8)+a2ats(share=0.1, window=8, sinks=2)",
    "less",
    "snapkv(window=8)+kvsharer",
    "h2o+kv_heads",
    "snapkv(window=8)+headkv",
    "snapkv(window=8)+chai",
    "h2o+compresskv(least=8)",
)


def artifacts() -> dict[str, tuple[dict[str, Tensor], dict[str, object]]]:
    """Random ones for the tiny Llama: 2 layers, 4 query heads over 2 KV heads, 16 elements."""
    generator = torch.Generator().manual_seed(0)
    factor = 0.2 * torch.randn(2, 4, 16, 16, generator=generator)
    return {
        "qfilters": ({"filters": torch.randn(2, 2, 16, generator=generator)}, {}),
        "expected_attention_stats": (
            {"mean": torch.randn(2, 4, 16, generator=generator), "covariance": triangle(factor @ factor.mT)},
            {},
        ),
        "compresskv": ({"heads": torch.tensor([[1, 2], [0, 3]]), "importance": torch.tensor([0.3, 0.7])}, {}),
        "less": (state_weights(), {}),
        "kv_heads": (
            {
                name: torch.linalg.qr(torch.randn(2, 1, 32, 16, generator=generator)).Q.contiguous()
                for name in ("keys", "values")
            },
            {},
        ),
        "a2ats": (
            {
                "words": torch.randn(2, 2, 16, 16, generator=generator),
                "factor": torch.eye(16).expand(2, 2, 16, 16),
                "inv_freq": 0.1 ** torch.arange(8).expand(2, 8),
                "interleaved": torch.tensor(False),
                "scaling": torch.tensor(1.0),
                "base": torch.tensor(100),
            },
            {},
        ),
        "kvsharer": ({"owners": torch.tensor([0, 0])}, {}),
        "chai": ({"owners": torch.tensor([[0, 0], [0, 1]]), "sources": torch.tensor([[0, 1, 1, 0], [0, 1, 2, 3]])}, {}),
        "razor_attention": ({"induction": torch.rand(2, 2, generator=generator), "echo": torch.zeros(2, 2)}, {}),
        "top_theta": (
            {"lengths": torch.tensor([32, 64]), "thresholds": 0.02 * torch.rand(2, 4, 2, generator=generator)},
            {"on": "weights", "k": 8, "first": 16},
        ),
    }


@pytest.fixture(autouse=True)
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    mark = fingerprint(tiny_model("llama"))
    for method, (tensors, parameters) in artifacts().items():
        Artifact(method, mark, tensors, parameters).save()


@pytest.mark.parametrize("policy", POLICIES)
def test_padded_rows_equal_their_single_runs(policy):
    model = tiny_model("llama")
    texts = [random_text(n, seed=n) for n in (40, 120, 97)]
    ids, mask = left_padded(texts)
    ids, mask = torch.cat([ids, random_text(6, rows=3)], dim=1), torch.cat([mask, torch.ones(3, 6).long()], dim=1)
    batch = KVCache(model, policy, 48)
    logits = feed(model, batch, ids, [120] + [1] * 6, mask)
    for b, text in enumerate(texts):
        single = KVCache(model, policy, 48)
        expected = feed(model, single, torch.cat([text, ids[b : b + 1, -6:]], dim=1), [text.shape[1]] + [1] * 6)
        torch.testing.assert_close(logits[b : b + 1, mask[b].bool()], expected, atol=1e-4, rtol=0)
        for layer in range(len(batch.enforcer.layers)):
            assert kept_positions(batch, layer, b) == kept_positions(single, layer)


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_bound_it_and_forks_go_on_alike(policy):
    model, ids = tiny_model("llama"), random_text(150)
    cache = KVCache(model, policy, "24KiB")
    feed(model, cache, ids[:, :140], [64, 64, 12])
    assert cache.enforcer.evictions > 0
    fork = cache.fork()
    one, other = (feed(model, c, ids[:, 140:], [1] * 10) for c in (cache, fork))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
