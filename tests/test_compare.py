"""Comparisons under teacher forcing: the figures against a plain computation, and runs that measuring does not change."""

import pytest
import torch

from kvbudget import KVCache, generate
from kvbudget.compare import compare
from kvbudget.errors import KVBudgetError
from tiny import random_text, tiny_model


class Words:
    """A tokenizer of numbers: the text "5 17" is the tokens 5 and 17."""

    chat_template = None
    pad_token_id = 0
    eos_token_id = None

    def __call__(self, text, add_special_tokens=True, **kwargs):
        return type("Encoded", (), {"input_ids": [int(word) for word in text.split()]})()

    def decode(self, ids, skip_special_tokens=True, **kwargs):
        return " ".join(str(int(i)) for i in ids)


TOKENIZER = Words()
PROMPT = TOKENIZER.decode(random_text(120)[0])
QUESTION = "9 11 13"


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama")
    model.generation_config.suppress_tokens = None  # what is measured is the model's own distribution
    return model


def logits_by_hand(model, cache, known, answer):
    """Next-token logits ``[n, V]`` of the answer: the prompt as generate() feeds it, then one token after the other."""
    ids = torch.tensor([TOKENIZER(f"{PROMPT}\n\n{QUESTION}").input_ids])
    rows = []
    with torch.inference_mode():
        model(ids[:, :known], past_key_values=cache)
        rows.append(model(ids[:, known:], past_key_values=cache).logits[0, -1])
        for token in answer[:-1]:
            rows.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(rows).double().log_softmax(-1)


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize(("policy", "budget"), [("snapkv", 48), ("streaming_llm", 20), ("kivi(bits=2)", None)])
def test_figures_are_those_of_a_plain_computation(model, policy, budget, visible):
    options = {"question": QUESTION, "question_visible": visible, "max_new_tokens": 20}
    full, cut = compare(model, TOKENIZER, PROMPT, [(policy, budget)], **options)
    assert full.fidelity is None
    answer = full.generation.token_ids
    known = 120 + 3 - 1 if visible else 120
    p = logits_by_hand(model, KVCache(model), known, answer)
    q = logits_by_hand(model, KVCache(model, policy, budget), known, answer)
    assert p.argmax(-1).tolist() == list(answer)
    kl = (p.exp() * (p - q)).sum(-1)
    assert cut.fidelity.tokens == 20
    assert cut.fidelity.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
    assert cut.fidelity.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert cut.fidelity.kl_mean > 1e-4


def test_a_budget_that_holds_everything_is_no_different(model):
    _, same = compare(model, TOKENIZER, PROMPT, [("snapkv", 1000)], max_new_tokens=20)
    assert same.fidelity.kl_mean < 1e-6
    assert same.fidelity.agreement == 1.0


def test_measuring_changes_nothing_about_a_run(model):
    runs = list(
        compare(model, TOKENIZER, PROMPT, [("snapkv", 48), ("knorm+kivi(residual=32)", "64KiB")], max_new_tokens=40)
    )
    settings = [("full", None), ("snapkv", 48), ("knorm+kivi(residual=32)", "64KiB")]
    for run, (policy, budget) in zip(runs, settings, strict=True):
        alone = generate(model, TOKENIZER, PROMPT, policy=policy, budget=budget, max_new_tokens=40)
        assert run.generation.token_ids == alone.token_ids
        assert run.generation.report == alone.report
        run.generation.cache.check_integrity()
        assert len(run.generation.cache.enforcer.layers[0].main) == len(alone.cache.enforcer.layers[0].main)


def test_each_run_is_announced_and_yielded_when_it_ends(model):
    begun = []
    runs = compare(
        model, TOKENIZER, PROMPT, [("knorm", 0.5)], begin=lambda policy, budget: begun.append((policy, budget)),
        max_new_tokens=2,
    )  # fmt: skip
    next(runs)
    assert begun == [("full", "full")]
    next(runs)
    assert begun == [("full", "full"), ("knorm", "50%")]


def test_an_interrupted_run_is_the_last(model):
    pieces = []

    def interrupting(text):
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    (only,) = compare(model, TOKENIZER, PROMPT, [("snapkv", 48)], max_new_tokens=20, stream=interrupting)
    assert only.generation.interrupted and only.fidelity is None


def test_tokens_that_are_ruled_out_leave_the_divergence_finite():
    model = tiny_model("llama")
    assert model.generation_config.suppress_tokens
    _, cut = compare(model, TOKENIZER, PROMPT, [("snapkv", 48)], max_new_tokens=8)
    assert 0 < cut.fidelity.kl_mean < float("inf")


def test_sampling_is_refused(model):
    with pytest.raises(KVBudgetError, match="greedy"):
        next(compare(model, TOKENIZER, PROMPT, [("snapkv", 48)], do_sample=True))
