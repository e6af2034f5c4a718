"""The rules of policy="auto": what is picked when, and that it is said."""

import pytest
import torch

from kvbudget import auto
from kvbudget.auto import calibrated, choose
from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.methods import registry
from kvbudget.policy.base import Recipe
from tiny import random_text, tiny_model

HIDDEN = {"question_visible": False, "can_prefill": True}


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
        ("25%", {"length": 1000, "new_tokens": 200, **HIDDEN}, "kvzip", "25% of the text"),
        (250, {"length": 1000, **HIDDEN}, "kvzip", "25% of the text"),
        ("25%", {"length": 1000, "question_visible": False}, "snapkv+adakv", "unknown and no plan can run"),
        ("64KiB", {"length": 300, **HIDDEN}, "snapkv+adakv", "unknown"),
        ("25%", {"length": 1000, "question_visible": True, "can_prefill": True}, "snapkv+adakv", "visible"),
        ("256KiB", {"length": 3000, "question_visible": True}, "snapkv+adakv+kivi(bits=4)", "more than twice as many"),
        ("256KiB", {"length": 1400, "new_tokens": 1600}, "snapkv+kivi(bits=4)", "still to be generated"),
        (200, {}, "snapkv+adakv", "nothing is known about the question"),
    ],
)  # fmt: skip
def test_rules(budget, known, policy, reason):
    choice = choose(tiny_model("llama"), Budget.parse(budget), **known)
    assert choice.policy == policy
    assert reason in choice.reason


def test_calibrated_methods_are_found_and_used(monkeypatch):
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
    assert choose(model, Budget.parse("40%"), **known).policy == "snapkv+adakv"
    assert choose(other, Budget.parse("60%"), **known).policy == "snapkv+adakv"


def test_the_cache_keeps_the_reason():
    model = tiny_model("llama")
    cache = KVCache(model, "auto", "25%", max_length=400)
    with torch.inference_mode():
        model(random_text(300), past_key_values=cache)
    report = cache.report()
    assert report.policy == "snapkv+adakv" and "25% of the text" in report.reason
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
