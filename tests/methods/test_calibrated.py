"""Calibrated methods under the registry's properties: padded rows, byte budgets, forks, head groups, all budgets."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from brute import kept_positions
from induction import repeating_model
from test_less import weights as state_weights
from test_registry import feed
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.calibrate import build, calibrate, registry
from kvbudget.errors import BudgetError, PolicyError
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
    "snapkv(window=8)+epicache_layers",
    "h2o+compresskv(least=8)",
    "fast_kvzip(window=8)",
    "kvzap(window=8, depth=0)",
    "locret(recent=8)",
    "wg_kv(window=8, admit=0.7)",
    "task_kv(judged=texts, window=8, recent=8, sinks=2)",
)
# Heads that keep everything need more room than the other tests leave.
PINNED = ("razor_attention", "duo_attention(sinks=4, recent=0)")


def artifacts(model: PreTrainedModel) -> dict[str, tuple[dict[str, Tensor], dict[str, object]]]:
    """Random ones for a tiny Llama of 2 layers, with heads of 16 elements."""
    generator = torch.Generator().manual_seed(0)
    queries, heads = model.config.num_attention_heads, model.config.num_key_value_heads
    factor = 0.2 * torch.randn(2, queries, 16, 16, generator=generator)
    first = [q % (queries // heads) for q in range(queries)]
    gates = {
        name: (build(name).untrained(model, generator), {}) for name in ("fast_kvzip", "locret", "wg_kv")
    }  # fmt: skip
    width = 16 * (queries + 2 * heads)
    return gates | {
        "kvzap": (
            {
                "weight": torch.randn(2, width, heads, generator=generator),
                "bias": torch.randn(2, 1, heads, generator=generator),
            },
            {},
        ),
        "qfilters": ({"filters": torch.randn(2, heads, 16, generator=generator)}, {}),
        "expected_attention_stats": (
            {"mean": torch.randn(2, queries, 16, generator=generator), "covariance": triangle(factor @ factor.mT)},
            {},
        ),
        "compresskv": (
            {"heads": torch.tensor([[1, 2], [0, queries - 1]]), "importance": torch.tensor([0.3, 0.7])},
            {},
        ),
        "less": (state_weights(2, queries, heads), {}),
        "kv_heads": (
            {
                name: torch.linalg.qr(torch.randn(2, 1, 16 * heads, 8 * heads, generator=generator)).Q.contiguous()
                for name in ("keys", "values")
            },
            {},
        ),
        "a2ats": (
            {
                "words": torch.randn(2, heads, 16, 16, generator=generator),
                "factor": torch.eye(16).expand(2, heads, 16, 16),
                "inv_freq": 0.1 ** torch.arange(8).expand(2, 8),
                "interleaved": torch.tensor(False),
                "scaling": torch.tensor(1.0),
                "base": torch.tensor(100),
            },
            {},
        ),
        "epicache_layers": ({"similarity": torch.tensor([0.9, 0.6])}, {}),
        "kvsharer": ({"owners": torch.tensor([0, 0])}, {}),
        "chai": (
            {
                "owners": torch.tensor([[0] * heads, list(range(heads))]),
                "sources": torch.tensor([first, list(range(queries))]),
            },
            {},
        ),
        "razor_attention": (
            {"induction": torch.rand(2, heads, generator=generator), "echo": torch.zeros(2, heads)},
            {},
        ),
        "duo_attention": ({"change": torch.rand(2, heads, generator=generator)}, {}),
        "top_theta": (
            {"lengths": torch.tensor([32, 64]), "thresholds": 0.02 * torch.rand(2, queries, 2, generator=generator)},
            {"on": "weights", "k": 8, "first": 16},
        ),
        "task_kv": ({"distance": torch.rand(2, heads, generator=generator)}, {}),
    }


# How they are fitted to two short texts.
FITS: dict[str, dict[str, object]] = {
    "qfilters": {},
    "expected_attention_stats": {},
    "kvzap": {},
    "fast_kvzip": {"steps": 2},
    "locret": {"steps": 2},
    "wg_kv": {"steps": 2},
    "top_theta": {"k": 16, "first": 16},
    "compresskv": {"passage": 12, "cue": 4, "number": 1},
    "task_kv": {},
    "kvquant": {"tokens": 32},
    "cq": {"steps": 2},
    "csr": {"atoms": 32, "steps": 2},
    "commvq": {"steps": 2},
    "aquakv": {},
}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))


def calibrated(**options: int) -> PreTrainedModel:
    """A tiny Llama for which everything is calibrated."""
    model = tiny_model("llama", **options)
    for method, (tensors, parameters) in artifacts(model).items():
        Artifact(method, fingerprint(model), tensors, parameters).save()
    return model


@pytest.mark.parametrize("policy", POLICIES)
def test_padded_rows_equal_their_single_runs(policy):
    model = calibrated()
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
    model, ids = calibrated(), random_text(150)
    cache = KVCache(model, policy, "24KiB")
    feed(model, cache, ids[:, :140], [64, 64, 12])
    assert cache.enforcer.evictions > 0
    fork = cache.fork()
    one, other = (feed(model, c, ids[:, 140:], [1] * 10) for c in (cache, fork))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [(3, 3), (3, 1), (8, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("policy", POLICIES + PINNED)
def test_all_head_groups_and_exact_where_everything_fits(policy, heads):
    model, ids = calibrated(num_attention_heads=heads[0], num_key_value_heads=heads[1]), random_text(64)
    with torch.inference_mode():
        expected = model(ids).logits
    whole = KVCache(model, policy, 200)
    logits = feed(model, whole, ids, [40, 20] + [1] * 4)
    if whole.policy.lossless_when_fits:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    small = KVCache(model, policy, "80%" if policy in PINNED else 32)
    assert bool(feed(model, small, ids, [60] + [1] * 4).isfinite().all()) and small.enforcer.evictions > 0


@pytest.mark.parametrize("policy", POLICIES + PINNED)
def test_tiny_budgets_are_kept_or_refused(policy):
    model, ids, kept = calibrated(), random_text(60), []
    for budget in (1, 5, 48, "100B", "3KiB", "40KiB", "0.5%"):
        try:
            feed(model, KVCache(model, policy, budget), ids, [57] + [1] * 3)
        except (BudgetError, PolicyError) as error:
            assert "give" in str(error), error
            continue
        kept.append(budget)
    assert "100B" not in kept and {48, "40KiB"} <= {*kept}


@pytest.mark.parametrize("method", FITS)
def test_a_stopped_fit_goes_on_and_another_model_refuses_it(method, tmp_path):
    # Only a model that repeats passages has what CompressKV looks for.
    model = repeating_model() if method == "compresskv" else tiny_model("llama")
    texts = [torch.randperm(127, generator=torch.Generator().manual_seed(s))[:100] + 1 for s in range(2)]
    settings: dict[str, object] = {"texts": texts, "count": 2, "length": 100} | FITS[method]
    begun: list[int] = []

    def stop(done: int, total: int) -> None:
        begun.append(done)
        if begun == [0, 1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(method, model, tmp_path / "stopped", progress=stop, **settings)
    calibrate(method, model, tmp_path / "stopped", progress=stop, **settings)
    calibrate(method, model, tmp_path / "whole", **settings)
    assert begun == [0, 1, 1, 2]
    one, other = (Artifact.load(method, fingerprint(model), tmp_path / name).tensors for name in ("stopped", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    with pytest.raises(PolicyError, match=rf"another model.*kvbudget calibrate {method}"):
        KVCache(tiny_model("llama", seed=1), f"{method}(file={str(tmp_path / 'whole')!r})", 200)


@pytest.mark.parametrize("method", registry())
def test_numbers_that_no_fit_can_have_are_refused_by_name(method):
    for field in fields(registry()[method]):
        if type(field.default) not in (int, float):
            continue
        for value in (-1, float("nan"), 2**31, "x", True):
            with pytest.raises(PolicyError, match=re.escape(f"the calibration of {method}: {field.name}={value!r}")):
                build(method, **{field.name: value})


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("cq", {"rows": 0}, "rows=0 must be at least 1"),
        ("cq", {"sinks": 1024}, "sinks=1024 leave nothing of texts of 1024 tokens"),
        ("aquakv", {"bits": 5}, "grids of 2, 3 and 4 bits"),
        ("less", {"rank": 10**6}, "rank=1000000 is more than can be trained; give 1 to 4096"),
        ("less", {"hidden": 4097}, "hidden=4097 is more"),
        ("locret", {"hidden": 2**31 - 1}, "hidden=2147483647 is more"),
        ("fast_kvzip", {"dim": 10**6}, "dim=1000000 is more"),
    ],
)
def test_fits_to_nothing_are_refused(method, given, message):
    with pytest.raises(PolicyError, match=message):
        build(method, **given)


def test_what_is_larger_than_a_text_or_a_model_is_cut_or_refused(tmp_path):
    model = tiny_model("llama")
    calibrate(
        "wg_kv", model, tmp_path / "gates", texts=[random_text(80)[0]], count=1, length=80, steps=1, batch=2**31 - 1
    )
    wide = tiny_model("llama", num_hidden_layers=200)
    with pytest.raises(PolicyError, match=r"less: .*rank=4096, hidden=4096 need [34]..\..*GiB.*give less"):
        build("less", rank=4096, hidden=4096).start(wide)
    with pytest.raises(
        PolicyError, match="repeats=1000000 of a block of two tokens do not fit into 1024 positions; give 2 to 511"
    ):
        calibrate("razor_attention", model, repeats=10**6)
