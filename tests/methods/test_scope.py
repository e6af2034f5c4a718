"""SCOPE: pools for prompt and answer, against brute force."""

import pytest
import torch
from brute import Brute, best, kept_positions, run

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Stages
from kvbudget.policy.scorers.received import NewestAttention
from tiny import random_text, tiny_model


def decode(model, cache, count, seed=1, see=None):
    with torch.inference_mode():
        for token in random_text(count, seed=seed)[0]:
            model(token.view(1, 1), past_key_values=cache)
            cache.check_integrity()
            if see is not None:
                see()


@pytest.mark.parametrize("base", ["snapkv(window=16)", "knorm", "kvzip(uniform=True)"])
def test_decoding_never_touches_the_prompt(base):
    model, ids = tiny_model("llama"), random_text(150)
    cache = KVCache(model, f"{base}+scope(prompt=0.6, recent=4, every=1)", 50)
    cache.prefill(model, ids)
    prompt = [kept_positions(cache, layer) for layer in range(2)]
    assert [[len(row) for row in layer] for layer in prompt] == [[30, 30]] * 2

    def see():
        for layer in range(2):
            for row, before in zip(kept_positions(cache, layer), prompt[layer], strict=True):
                assert row[:30] == before and len(row) <= 50

    decode(model, cache, 60, see=see)
    assert cache.report().kept == [[[50, 50]]] * 2


class Slide:
    """The paper's rule for the answer: the newest ``recent`` entries, and the best of the others by the newest query."""

    def __init__(self, prompt, limit, recent):
        self.prompt, self.limit, self.recent, self.kept = prompt, limit, recent, {}

    def __call__(self, step, limit):
        if step.seen == self.prompt:
            sizes = [len(head.positions) for head in step.heads]
            scores = [-head.keys.norm(dim=-1) for head in step.heads]
            assert len(set(sizes)) == 1
            return [
                best(s.masked_fill(head.positions >= step.seen - self.recent, float("inf")), limit)
                for s, head in zip(scores, step.heads, strict=True)
            ]
        kept = []
        for head, weights in zip(step.heads, step.weights, strict=True):
            scores = weights[:, -1].mean(0)
            scores = scores.masked_fill(head.positions < self.prompt, 1e30)
            kept.append(best(scores.masked_fill(head.positions >= step.seen - self.recent, float("inf")), limit))
        return kept


def test_the_answer_is_judged_by_the_newest_query():
    model = tiny_model("llama")
    cache = KVCache(model, "knorm+scope(prompt=0.5, recent=4, every=1)", 48)
    rule = Slide(100, 48, 4)

    class Growing(Brute):
        def forward(self, index, call):
            self.limit = 24 if self.seen.get(index, 0) + call.key.shape[2] <= 100 else 48
            return super().forward(index, call)

    run(model, cache, random_text(160), [100] + [1] * 60, Growing(rule, 48))


def test_the_pool_of_the_answer_grows():
    stages = Stages(NewestAttention(), prompt=0.25, recent=10, length=110)
    assert [stages.entries(80, 1000, 1000 + t) for t in (0, 1, 50, 100, 500)] == [20, 30.5, 55, 80, 80]
    model = tiny_model("llama")
    cache, sizes = KVCache(model, "knorm+scope(prompt=0.5, recent=8, length=88, every=1)", 64), []
    cache.prefill(model, random_text(100))
    decode(model, cache, 100, see=lambda: sizes.append(cache.report().kept[0][0][0]))
    assert sizes[:8] == list(range(33, 41)) and sizes[-1] == 64
    assert all(size <= 33 + 8 + (t + 1) * 24 / 80 for t, size in enumerate(sizes))


def test_a_pool_that_never_grows_is_a_recent_window():
    model = tiny_model("llama")
    cache = KVCache(model, "knorm+scope(prompt=0.5, recent=8, length=1000000000, every=1)", 64)
    cache.prefill(model, random_text(100))
    decode(model, cache, 40)
    assert [row[32:] for layer in range(2) for row in kept_positions(cache, layer)] == [list(range(132, 140))] * 4


def test_selecting_less_often_judges_as_much_less_often():
    model, evictions = tiny_model("llama"), []
    for every in (1, 8):
        cache = KVCache(model, f"knorm+scope(recent=4, every={every})", 128)
        cache.prefill(model, random_text(200))
        decode(model, cache, 64 + 80)
        evictions.append(cache.enforcer.evictions)
    assert evictions[0] - 2 == pytest.approx(8 * (evictions[1] - 2), rel=0.15), "2 of them are the prompt's"


def test_a_chunked_prompt_and_a_declared_length_that_fits():
    model, ids = tiny_model("llama"), random_text(120)
    cache = KVCache(model, "scope(recent=8)", 60)
    cache.prefill(model, ids, chunk_size=25)
    assert cache.report().kept == [[[33, 33]]] * 2, "half of it, but no less than SnapKV's window"
    fits = KVCache(model, "scope", "100%", max_length=130)
    fits.prefill(model, ids)
    decode(model, fits, 10)
    assert fits.enforcer.evictions == 0


def test_forks_and_batches_know_their_prompts():
    model, ids = tiny_model("llama"), random_text(90)
    cache = KVCache(model, "knorm+scope(recent=4)", 40)
    cache.prefill(model, ids)
    fork = cache.fork()
    fork.batch_repeat_interleave(2)
    answers = [
        model.generate(
            torch.cat([ids, ids[:, :1]], dim=1).repeat(n, 1), past_key_values=c, max_new_tokens=30, do_sample=False
        )
        for c, n in ((cache, 1), (fork, 2))
    ]
    assert torch.equal(answers[0], answers[1][:1]) and torch.equal(answers[0], answers[1][1:])
    assert kept_positions(fork, 0, 1) == kept_positions(cache, 0)


def test_refusals():
    with pytest.raises(PolicyError, match="between 0 and 1"):
        KVCache(tiny_model("llama"), "scope(prompt=1.0)", 50)
