"""The rules of policy="auto": what is picked when, and that it is said."""

import pytest
import torch

from kvbudget import auto
from kvbudget.auto import calibrated, choose
from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.methods import parse, registry
from kvbudget.policy.base import Recipe
from tiny import random_text, tiny_model

HIDDEN = {"question_visible": False, "can_prefill": True}


def situation(visible: bool, share: float, *policies: str) -> dict:
    """A situation as measured, best policy first."""
    utility = {p: {"utility": 0.9 - 0.1 * i, "behind": [0.05 * i, 0.15 * i]} for i, p in enumerate(policies)}
    return {"visible": visible, "share": share, "policies": utility}


MEASURED = [
    situation(False, 0.5, "razor_attention", "kvzip", "h2o", "snapkv+adakv"),
    situation(False, 0.12, "kvzip", "snapkv", "h2o"),
    situation(True, 0.5, "snapkv+adakv", "tova"),
    situation(True, 0.12, "lagkv", "tova"),
]


@pytest.fixture
def measured(monkeypatch):
    """Rules are tested on a table of their own, so that new measurements do not change what is expected."""
    monkeypatch.setattr(auto, "table", lambda: MEASURED)


@pytest.mark.parametrize(
    "budget, known, policy, reason",
    [
        (None, {}, "full", "no budget"),
        ("1MiB", {"length": 300}, "full", "all 300 tokens fit into 1MiB"),
        (500, {"length": 300, "new_tokens": 200}, "full", "all 500 tokens"),
        ("512KiB", {"length": 1300}, "kivi(bits=4)", "at 4 bits, so nothing has to leave"),
        ("6KiB", {"length": 300}, "streaming_llm", "too little to observe"),
        (50, {"length": 300, **HIDDEN}, "streaming_llm", "too little to observe"),
        ("25%", {"length": 1000, "new_tokens": 1001, **HIDDEN}, "snapkv", "still to be generated"),
        ("20%", {"length": 1000, "new_tokens": 200, **HIDDEN}, "kvzip", "20% of the text"),
        (250, {"length": 1000, **HIDDEN}, "kvzip", "25% of the text"),
        ("25%", {"length": 1000, "question_visible": False}, "h2o", "the question is unknown"),
        ("20%", {"length": 1000, "question_visible": False}, "snapkv", "measured best of what can run here, at 12%"),
        ("64KiB", {"length": 300, **HIDDEN}, "h2o", "unknown"),
        ("50%", {"length": 1000, "question_visible": True}, "snapkv+adakv", "measured best of what can run here, at 50%"),
        ("15%", {"length": 1000, "question_visible": True}, "lagkv", "visible"),
        (100, {"length": 1000, "question_visible": True}, "tova", "10% of the text"),
        ("256KiB", {"length": 3000, "question_visible": True}, "snapkv+adakv+kivi(bits=4)", "more than twice as many"),
        ("256KiB", {"length": 1400, "new_tokens": 1600}, "snapkv+kivi(bits=4)", "still to be generated"),
        (200, {}, "h2o", "nothing is known about the question"),
    ],
)  # fmt: skip
def test_rules(measured, budget, known, policy, reason):
    choice = choose(tiny_model("llama"), Budget.parse(budget), **known)
    assert choice.policy == policy
    assert reason in choice.reason


def test_calibrated_methods_are_found_and_used(measured, monkeypatch):
    class Razor(Recipe):
        name, needs = "razor_attention", ("calibration",)

        def bind(self, fingerprint):
            if fingerprint != mark:
                raise PolicyError("not calibrated for this model")
            return self

    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    mark = auto.fingerprint(model)
    monkeypatch.setattr(auto, "registry", lambda: {"razor_attention": Razor})
    assert calibrated(model) == ("razor_attention",) and calibrated(other) == ()
    known = {"length": 1000, "question_visible": False}
    assert choose(model, Budget.parse("60%"), **known).policy == "razor_attention"
    assert choose(model, Budget.parse("20%"), **known).policy == "snapkv"
    assert choose(other, Budget.parse("60%"), **known).policy == "h2o"


def test_what_cannot_run_with_anything_measured_falls_back(monkeypatch):
    monkeypatch.setattr(auto, "table", lambda: [situation(False, 0.5, "kvzip")])
    choice = choose(tiny_model("llama"), Budget.parse("50%"), length=1000, question_visible=False)
    assert choice.policy == "snapkv" and "nothing that was measured" in choice.reason


@pytest.mark.parametrize("can_prefill", [True, False])
def test_the_choice_is_never_behind_the_best_fixed_method(can_prefill):
    """On the table as it is committed: in every situation, and by the mean over all of them."""
    model = tiny_model("llama")
    own, fixed = [], {}
    for row in auto.table():
        asked = {"length": 4000, "question_visible": row["visible"], "can_prefill": can_prefill}
        choice = choose(model, Budget.parse(f"{row['share']:.2%}"), **asked).policy
        found = row["policies"][choice]
        own.append(found["utility"])
        for name, other in row["policies"].items():
            # What needs a calibration has none for this model.
            needs = parse(name).needs
            if "calibration" not in needs and (can_prefill or "plan" not in needs):
                fixed.setdefault(name, []).append(other["utility"])
                low, high = found["behind"]
                assert other["utility"] - found["utility"] <= high - low
    best = max(sum(values) for values in fixed.values() if len(values) == len(own))
    assert sum(own) >= best


def test_the_cache_keeps_the_reason(measured):
    model = tiny_model("llama")
    cache = KVCache(model, "auto", "25%", max_length=400)
    with torch.inference_mode():
        model(random_text(300), past_key_values=cache)
    report = cache.report()
    assert report.policy == "h2o" and "25% of the text" in report.reason
    assert report.reason in str(report) and report.to_dict()["reason"] == report.reason
    assert cache.fork().report().reason == report.reason
    assert KVCache(model, "snapkv", 100).report().reason is None


@pytest.mark.parametrize("name", ["llama", "lfm2", "gemma2"])
@pytest.mark.parametrize("budget", ["30KiB", "100KiB", "1MiB", "10%", "90%", 20, 300, None])
def test_what_is_picked_can_be_built(name, budget):
    """Whatever a cache picks by itself runs under a bare forward."""
    model = tiny_model(name)
    cache = KVCache(model, "auto", budget)
    assert "plan" not in cache.policy.needs
    with torch.inference_mode():
        model(random_text(130), past_key_values=cache)
    cache.check_integrity()
    assert set(cache.policy.names) <= set(registry())
