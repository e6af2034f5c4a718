"""FastGen against profiles by brute force, and what the tokenizer tells it about the text."""

import math
from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, chunks, kept_positions, run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.policy.marks import DELIMITER, PUNCTUATION, SPECIAL, mark_of, marks_of
from kvbudget.policy.scorers.profile import POLICIES
from kvbudget.policy.view import Queries, View
from tiny import VOCAB_SIZE, left_padded, random_text, tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Ids 1 and 2 are special, 3 to 12 punctuation, all others words."""
    words = ["<pad>", "<s>", "</s>", *".,;:!?()", "\u2014", "'", *(f"w{i}" for i in range(13, VOCAB_SIZE))]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def by_profile(ids: Tensor, recovery: float, frequent: float, local: float, sinks: int = 4):
    """The paper's rule for one sequence; the memory sums attention, ``found`` what each policy recovers."""
    found: dict[tuple[int, int], Tensor] = {}
    special_text, punctuation_text = (ids < 3), (ids >= 3) & (ids < 13)

    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        kept = []
        for h, (head, weights) in enumerate(zip(step.heads, step.weights, strict=True)):
            rows = weights.mean(0)
            head.memory = head.memory + rows.sum(0)
            known = head.positions < len(special_text)
            at = head.positions.clamp_max(len(special_text) - 1)
            special = (special_text[at] & known) | (head.positions < sinks)
            few = special | (punctuation_text[at] & known)
            rate = head.memory / (step.seen - head.positions)
            top = [i for i in rate.argsort(descending=True, stable=True).tolist() if not few[i]]
            often = few.clone()
            often[top[: math.ceil(frequent * step.seen)]] = True
            band = int(local * step.seen)
            steps = torch.arange(step.seen - step.new, step.seen)
            near = often | (head.positions > (steps - band)[:, None])
            recovered = torch.stack([rows[:, m].sum() for m in (special, few, often)] + [(rows * near).sum()])
            key = (id(step.heads), h)
            if step.new > 1:
                sums, number = found.get(key, (torch.zeros(4).double(), 0))
                found[key] = (sums + recovered, number + step.new)
            sums, number = found[key]
            reached = (sums / number >= recovery).tolist() if recovery < 1 else [False] * 4
            policy = reached.index(True) if any(reached) else 4
            newest = often | (head.positions >= step.seen - band)
            member = (special, few, often, newest, torch.ones_like(few))[policy]
            kept.append(member.nonzero()[:, 0])
        return kept

    return rule


def policies(cache: KVCache) -> list[int]:
    return [p for store in cache.enforcer.layers for p in cache.parts.scorer.policies(View(store)).flatten().tolist()]


@pytest.mark.parametrize("sizes", [[120] + [1] * 8, chunks(120, 50) + [1] * 4], ids=len)
@pytest.mark.parametrize("recovery", [0.1, 0.48, 0.62])
def test_heads_keep_by_their_profiles(tokenizer, recovery, sizes):
    model, ids = tiny_model("llama", num_hidden_layers=3), random_text(sum(sizes))
    cache = KVCache(model, f"fastgen(recovery={recovery}, frequent=0.1, local=0.1, every=1)")
    prompt = ids[:, :120]
    cache.mark(prompt, None, tokenizer)
    run(model, cache, ids, sizes, Brute(by_profile(prompt[0], recovery, 0.1, 0.1), 0))
    assert len(set(policies(cache))) > 1 or recovery == 0.62 or len(sizes) == 7, (
        "all heads keep by one rule: the test shows little"
    )


def test_the_cheapest_and_the_fullest(tokenizer):
    model, ids = tiny_model("llama"), random_text(90)
    for recovery, expected in ((0.0, "special"), (1.0, "full")):
        cache = KVCache(model, f"fastgen(recovery={recovery})")
        cache.prefill(model, ids, tokenizer=tokenizer)
        assert {POLICIES[p] for p in policies(cache)} == {expected}
        special = {*range(4), *(ids[0] < 3).nonzero()[:, 0].tolist()}
        held = {tuple(row) for layer in range(2) for row in kept_positions(cache, layer)}
        assert held == {tuple(sorted(special))} or (expected == "full" and held == {tuple(range(90))})


def test_recovery_rises_along_the_policies(tokenizer):
    model = tiny_model("llama")
    cache = KVCache(model, "fastgen")
    cache.prefill(model, random_text(100), tokenizer=tokenizer)
    for store in cache.enforcer.layers:
        recovered = View(store).statistic("recovered")
        assert bool((recovered.diff(dim=-1) >= -1e-3).all()) and bool((recovered[..., 4] == 100).all())


def test_a_head_that_looks_at_the_first_token_keeps_special_ones():
    """The second of two heads looks there; the first looks at all alike, so that no cheap rule recovers much."""
    scorer = KVCache(tiny_model("llama"), "fastgen(recovery=0.9, frequent=0.1, local=0.1, sinks=1)").parts.scorer
    layer = LayerCache(0, 2, states=scorer.states)
    layer.marks = [torch.zeros(100, dtype=torch.uint8)]
    key = torch.zeros(1, 2, 100, 4)
    key[:, 1, 0, 0] = 20.0
    call = AttentionCall(torch.ones(1, 2, 100, 4), key, torch.randn(1, 2, 100, 4), scale=1.0)
    _, lse = layer.forward(call)
    view = View(layer, Queries(call.query, lse, 1.0))
    scorer.observe(view)
    assert [POLICIES[p] for p in scorer.policies(view).flatten()] == ["full", "special"]


def test_a_budget_caps_it():
    model = tiny_model("llama")
    cache = KVCache(model, "fastgen(recovery=1.0)", 40)
    run(model, cache, random_text(140), [120] + [1] * 20)
    kept = [len(row) for layer in range(2) for row in kept_positions(cache, layer)]
    assert max(kept) <= 41 and sum(kept) <= 160


def test_padded_batches_are_marked_like_single_texts(tokenizer):
    model = tiny_model("llama")
    texts = [random_text(n, seed=n) for n in (60, 90)]
    ids, mask = left_padded(texts)
    batch = KVCache(model, "fastgen(recovery=0.6)")
    batch.prefill(model, ids, attention_mask=mask, tokenizer=tokenizer)
    for b, text in enumerate(texts):
        single = KVCache(model, "fastgen(recovery=0.6)")
        single.prefill(model, text, tokenizer=tokenizer)
        for layer in range(2):
            assert kept_positions(batch, layer, b) == kept_positions(single, layer)
    batch.batch_select_indices(torch.tensor([1]))
    assert [marks.equal(marks_of(texts[1], tokenizer)[0]) for marks in batch.enforcer.layers[0].marks] == [True]


def test_marks_of_tokens(tokenizer):
    assert marks_of(torch.tensor([[1, 20, 4]]), tokenizer).tolist() == [[SPECIAL, 0, PUNCTUATION | DELIMITER]]
    assert [mark_of(t) for t in ("...", "\u3002", "(", " \n\n", "\n}", "3.", "", " ")] == [
        *(PUNCTUATION | DELIMITER,) * 2, PUNCTUATION, DELIMITER, PUNCTUATION, 0, 0, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["fastgen(recovery=1.5)", "fastgen(every=0)"])
def test_impossible_parameters_are_refused(text):
    with pytest.raises(PolicyError, match="fastgen"):
        KVCache(tiny_model("llama"), text, 64)
