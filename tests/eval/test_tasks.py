from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer

from kvbudget import KVCache
from kvbudget.errors import KVBudgetError
from kvbudget.eval.external import External
from kvbudget.eval.tasks import parse, registry
from kvbudget.eval.tasks.base import Example, Probe, Reading, Task, read, shuffled, visible_form
from kvbudget.eval.tasks.continuation import Continuation
from kvbudget.eval.tasks.few_shot import TOPICS
from tiny import tiny_model

TOKENIZER = byte_tokenizer()
NEEDS_DATA = ("gsm8k", "xquad", "qmsum")
OWN = sorted(name for name, kind in registry().items() if not issubclass(kind, External) and name != "own")
BURIED = ("needle", "passkey", "niah_single", "niah_multikey", "niah_multivalue", "multi_turn", "variable_tracking")


def task(name: str) -> Task:
    """A task on built-in text."""
    kind = registry()[name]
    given = {"length": 3000, "text": "prose"}
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})


def words(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize("name", OWN)
def test_examples_are_deterministic_and_well_formed(name: str, request: pytest.FixtureRequest) -> None:
    if name in NEEDS_DATA:
        request.getfixturevalue("shared_data")
    made = task(name)
    one, two, other = (made.examples(TOKENIZER, 3, seed) for seed in (1, 1, 2))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.context, b.context)
        for p, q in zip(a.probes, b.probes, strict=True):
            assert torch.equal(p.question, q.question) and torch.equal(p.answer, q.answer)
    assert not all(torch.equal(a.context, b.context) for a, b in zip(one, other, strict=True))
    for example in one:
        assert example.context.ndim == 1 and example.context.dtype == torch.long
        assert example.probes
        for probe in example.probes:
            assert probe.question.numel() and 0 <= probe.skip < probe.answer.numel()
        if hasattr(made, "length"):
            assert len(example.context) <= made.length


@pytest.mark.parametrize("name", BURIED)
def test_answers_are_in_the_context_and_lengths_hold(name: str) -> None:
    made = task(name)
    for example in made.examples(TOKENIZER, 4):
        assert made.length - 200 <= len(example.context) <= made.length
        text = words(example.context)
        for probe in example.probes:
            for value in words(probe.answer).split(","):
                assert value.strip() in text


def test_needles_are_where_they_are_said_to_be() -> None:
    depths = (0.0, 0.5, 1.0)
    examples = replace(task("needle"), depths=depths).examples(TOKENIZER, 6)
    for i, example in enumerate(examples):
        depth, at = example.info["depth"], example.info["position"]
        assert depth == depths[i % 3]
        sentence = (
            f" The special magic number for {example.probes[0].info['city']} is {words(example.probes[0].answer)}."
        )
        assert words(example.context[at : at + len(sentence)]) == sentence
        assert abs(at - depth * (len(example.context) - len(sentence))) < 120
    # One round over the depths shares needle and haystack, the next round does not.
    assert words(examples[0].probes[0].answer) == words(examples[2].probes[0].answer)
    assert words(examples[0].probes[0].answer) != words(examples[3].probes[0].answer)


def test_the_blank_before_digits_belongs_to_the_question() -> None:
    probe = task("needle").examples(TOKENIZER, 1)[0].probes[0]
    assert words(probe.question).endswith(" is ")
    assert words(probe.answer).isdigit()


def test_niah_asks_for_one_of_several_keys() -> None:
    for example in task("niah_multikey").examples(TOKENIZER, 4):
        text = words(example.context)
        assert text.count("One of the special magic numbers for") == 4
        key = example.probes[0].info["key"]
        assert f"numbers for {key} is: {words(example.probes[0].answer)}." in text


def test_few_shot_labels_are_balanced_and_sentences_new() -> None:
    example = task("few_shot").examples(TOKENIZER, 1)[0]
    text = words(example.context)
    assert {text.count(f"Topic: {label}\n") for label in TOPICS} == {12}
    assert sorted(words(p.answer).strip() for p in example.probes) == sorted([*TOPICS, *TOPICS])
    for probe in example.probes:
        assert words(probe.question).splitlines()[0] not in text


def test_renamed_labels_follow_one_renaming() -> None:
    made = parse("few_shot(renamed=True)")
    example = made.examples(TOKENIZER, 1, seed=3)[0]
    known = {}
    for block in words(example.context).strip().split("\n\n"):
        sentence, label = block.split("\nTopic: ")
        topic = next(t for t, (patterns, *_) in TOPICS.items() if _matches(sentence.removeprefix("Text: "), patterns))
        assert known.setdefault(topic, label) == label
    assert known != {topic: topic for topic in TOPICS}


def _matches(sentence: str, patterns: str) -> bool:
    pieces = [pattern.replace("{1}", "{0}").split("{0}") for pattern in patterns.split("|")]
    return any(all(piece in sentence for piece in parts) for parts in pieces)


def test_recall_spans_are_verbatim() -> None:
    example = task("recall").examples(TOKENIZER, 1)[0]
    for probe in example.probes:
        begin = probe.info["position"]
        span = torch.cat([probe.question, probe.answer])
        assert torch.equal(span, example.context[begin : begin + 40])
        assert len(probe.answer) - probe.skip == 32  # tokens 9 to 40


def test_continuations_go_on_from_the_context() -> None:
    made = parse("fidelity(length=200, tokens=20, continuations=3, text=prose)")
    longer = Continuation(length=263, tokens=0, continuations=0, text="prose")
    (example,), (whole,) = made.examples(TOKENIZER, 1), longer.examples(TOKENIZER, 1)
    said = torch.cat([example.context, *(torch.cat([p.question, p.answer]) for p in example.probes)])
    assert torch.equal(said, whole.context)


def test_multi_turn_carries_the_earlier_turns() -> None:
    for example in task("multi_turn").examples(TOKENIZER, 2):
        first, second, third = example.probes
        assert words(third.question).startswith(words(second.question) + words(second.answer))
        assert words(second.question).startswith(words(first.question) + words(first.answer))


def test_variables_form_a_chain() -> None:
    example = parse("variable_tracking(length=3000, chains=2, hops=3, text=prose)").examples(TOKENIZER, 1)[0]
    text, value = words(example.context), example.probes[0].info["value"]
    chain = [name.strip() for name in words(example.probes[0].answer).split(",")]
    assert len(chain) == 4
    places = [text.index(f"VAR {chain[0]} = {value}.")]
    places += [text.index(f"VAR {b} = VAR {a}.") for a, b in pairwise(chain)]
    assert places == sorted(places)


def test_common_words_are_the_most_common() -> None:
    example = task("common_words").examples(TOKENIZER, 1)[0]
    counted: dict[str, int] = {}
    for word in words(example.context).split("\n")[1].split()[1::2]:
        counted[word] = counted.get(word, 0) + 1
    frequent = sorted(counted, key=lambda word: -counted[word])[:3]
    assert sorted(frequent) == sorted(example.info["words"])


def test_xquad_answers_are_in_the_document(shared_data: object) -> None:
    for example in task("xquad").examples(TOKENIZER, 3):
        for probe in example.probes:
            assert words(probe.answer).strip() in words(example.context)


def test_the_final_number_of_a_problem_is_graded(shared_data: object) -> None:
    for example in task("gsm8k").examples(TOKENIZER, 2):
        for probe in example.probes:
            assert words(probe.answer).strip().endswith(f"#### {probe.info['answer']}")


def test_unknown_tasks_and_parameters_are_refused() -> None:
    with pytest.raises(KVBudgetError, match="did you mean 'needle'"):
        parse("needel")
    with pytest.raises(KVBudgetError, match="did you mean 'length'"):
        parse("needle(lenght=3)")
    for text in ("fidelity(length=0)", "recall(skip=40)", "recall(length=100)", "needle(depths=(0.5, 1.5))"):
        with pytest.raises(KVBudgetError, match=r"give skip|at least 1|from 0"):
            parse(text)
    with pytest.raises(KVBudgetError, match="default 1024"):
        parse("needle(length=one)")
    with pytest.raises(KVBudgetError, match="one name"):
        parse("needle+recall")


def test_visible_form_asks_the_same_text() -> None:
    example = task("needle").examples(TOKENIZER, 1)[0]
    (probe,) = example.probes
    context, rest = visible_form(example, probe)
    said = torch.cat([example.context, probe.question, probe.answer])
    assert torch.equal(torch.cat([context, rest.question, rest.answer]), said)
    assert len(rest.question) == 1


def test_shuffling_moves_every_answer() -> None:
    examples = [
        Example(torch.arange(3), [Probe(torch.tensor([i]), torch.tensor([10 * i + j])) for j in range(2)])
        for i in range(3)
    ]
    dealt = [int(p.answer) for e in shuffled(examples) for p in e.probes]
    kept = [int(p.answer) for e in examples for p in e.probes]
    assert sorted(dealt) == kept
    assert all(a != b for a, b in zip(dealt, kept, strict=True))


def test_a_reading_scores_what_greedy_decoding_would_do() -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    context = torch.randint(1, 256, (1, 50), generator=torch.Generator().manual_seed(5))
    cache = KVCache(model)
    with torch.inference_mode():
        model(context, past_key_values=cache)
        answer = model.generate(torch.cat([context, context[:, :3]], 1), max_new_tokens=6, do_sample=False)[0, 53:]
    right = read(model, cache, Probe(context[0, :3], answer))
    assert right.scores()["exact"] == 1.0
    wrong = answer.clone()
    wrong[2] = (wrong[2] + 1) % 256
    scores = read(model, cache, Probe(context[0, :3], wrong)).scores()
    assert scores["exact"] == 0.0
    assert scores["token_accuracy"] <= 5 / 6
    assert cache.get_seq_length() == 50


def test_skipped_tokens_are_not_scored() -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    cache = KVCache(model)
    with torch.inference_mode():
        model(torch.arange(1, 20)[None], past_key_values=cache)
    probe = Probe(torch.tensor([5]), torch.arange(1, 9))
    whole, part = read(model, cache, probe), read(model, cache, replace(probe, skip=3))
    assert torch.equal(part.logits, whole.logits[3:])
    assert part.targets.tolist() == [4, 5, 6, 7, 8]


def test_scores_of_a_known_reading() -> None:
    logits = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    reading = Reading(logits, torch.tensor([1, 2]))
    scores = reading.scores()
    assert scores["exact"] == 0.0 and scores["token_accuracy"] == 0.5
    expected = (logits[0, 1] - logits[0].logsumexp(0) + logits[1, 2] - logits[1].logsumexp(0)) / 2
    assert scores["logprob"] == pytest.approx(float(expected))


def test_label_free_tasks_score_distances_only() -> None:
    made = task("fidelity")
    reading = Reading(torch.randn(5, 7), torch.arange(5))
    assert made.score(reading) == {}
    scores = made.score(reading, reading)
    assert set(scores) >= {"log_kl", "kl_mean", "kl_p95", "agreement", "nll_rise", "perplexity_ratio"}
    assert scores["agreement"] == 1.0 and scores["kl_mean"] <= 1e-6
