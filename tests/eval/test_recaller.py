import pytest
import torch
from recaller import PAIRS, VALUES, pairs, recaller
from torch import Tensor

from kvbudget import KVCache
from kvbudget.eval.replay import record, replay
from kvbudget.eval.stats import bootstrap, compare
from kvbudget.eval.tasks.base import Example, Probe, read, shuffled, visible_form

pytestmark = pytest.mark.slow
SNAPKV = "snapkv(window=2, kernel=1)"
RANDOM = "random(sinks=0, recent=2)"


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    keys, values = pairs(PAIRS, 24, torch.Generator().manual_seed(99))
    context = torch.stack([keys, values], -1).flatten(1)
    # Two tokens of a question, so that its visible form ends with the key and asks again: key, value, key -> value would
    # give the answer away; key, key does not.
    return [
        Example(context[i], [Probe(keys[i, j : j + 1].repeat(2), values[i, j : j + 1]) for j in (1, 6, 11)])
        for i in range(len(context))
    ]


def accuracy(examples: list[Example], policy: str, budget: object, *, visible: bool) -> list[float]:
    """Share of right answers per example."""
    model = recaller()
    shares = []
    for example in examples:
        right = []
        blind = None if visible else replay(record(model, example.context[None]), KVCache(model, policy, budget))
        for probe in example.probes:
            cache, rest = blind, probe
            if cache is None:
                context, rest = visible_form(example, probe)
                cache = replay(record(model, context[None]), KVCache(model, policy, budget))
            right.append(read(model, cache, rest).scores()["exact"])
        shares.append(sum(right) / len(right))
    return shares


def test_the_full_cache_recalls_every_pair(examples: list[Example]) -> None:
    assert bootstrap(accuracy(examples, "full", None, visible=False)).mean >= 0.98


def test_shuffled_answers_score_at_chance(examples: list[Example]) -> None:
    found = bootstrap(accuracy(shuffled(examples), "full", None, visible=False))
    assert found.mean <= 4 / VALUES


def test_evicted_pairs_are_errors(examples: list[Example]) -> None:
    shares = [bootstrap(accuracy(examples, RANDOM, budget, visible=False)).mean for budget in ("75%", "50%", "25%")]
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.6


def test_random_is_worse_than_snapkv_that_sees_the_question(examples: list[Example]) -> None:
    snapkv = accuracy(examples, SNAPKV, "30%", visible=True)
    assert compare(accuracy(examples, RANDOM, "30%", visible=True), snapkv)[0] == "lower"


def test_seeing_the_question_beats_not_seeing_it(examples: list[Example]) -> None:
    visible = accuracy(examples, SNAPKV, "30%", visible=True)
    assert compare(accuracy(examples, SNAPKV, "30%", visible=False), visible)[0] == "lower"


@pytest.mark.parametrize(("scorer", "budget"), [(RANDOM, "6KiB"), (SNAPKV, "10KiB")])
def test_more_entries_in_four_bits_recall_more_than_fewer_in_sixteen(examples, scorer, budget) -> None:
    """At the same bytes, scales and positions counted (More Tokens, Lower Precision, arXiv 2412.12706)."""
    more, fewer = (
        accuracy(examples[:12], f"{scorer}+{codec}", budget, visible=False)
        for codec in ("quantized_pruning(bits=4, residual=0)", "bf16")
    )
    assert compare(fewer, more)[0] == "lower"


def test_the_probe_does_not_give_the_answer_away() -> None:
    question: Tensor = torch.tensor([7, 7])
    context, rest = visible_form(Example(torch.arange(4), []), Probe(question, torch.tensor([50])))
    assert context.tolist() == [0, 1, 2, 3, 7]
    assert rest.question.tolist() == [7]
