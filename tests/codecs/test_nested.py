"""QuantSpec: nested codes inside their bounds, the double buffer, and speculation that answers as plain decoding does."""

import pytest
import torch

from kvbudget.cache import KVCache
from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.codecs.nested import Refined
from kvbudget.errors import PolicyError
from kvbudget.speculate import drafting, speculate
from tiny import random_text, tiny_model

POLICY = "quantspec(group=16)"


@pytest.mark.parametrize(
    "base", [ChannelQuant(bits=4, unit=16, residual=16), TokenQuant(bits=4, group=16)], ids=["keys", "values"]
)
def test_both_views_stay_inside_their_bounds(base):
    x = torch.randn(64, 32) * torch.rand(32).exp() * 2
    codec, draft = Refined(base=base), Refined(base=base, draft=True)
    columns = codec.encode(x)
    scale = codec._step(columns, 32) * 16
    rounding = 1e-2 * scale  # of the scale and zero in half precision
    fine, coarse = (codec.decode(columns) - x).abs(), (draft.decode(columns) - x).abs()
    assert torch.equal(draft.decode(columns), base.decode(columns))
    assert bool((coarse <= scale / 2 + rounding).all())
    assert bool((fine <= scale / 16 + rounding).all())
    clamped = fine > scale / 32 + rounding
    assert float(clamped.float().mean()) < 0.06  # where +8 would have been needed
    assert sum(c.numel() * c.itemsize for c in columns.values()) == pytest.approx(64 * codec.bytes_per_entry(32))


def test_true_bits_at_the_papers_group():
    from kvbudget.methods import parse

    for codec in parse("quantspec").parts().codec:
        assert codec.bytes_per_entry(128) * 8 / 128 == 8 + 32 / 128


def test_two_groups_are_awaited_and_one_stays():
    model, ids = tiny_model("llama"), random_text(85)
    cache = KVCache(model, POLICY)
    for begin, end in [(0, 50), *((i, i + 1) for i in range(50, 85))]:
        with torch.inference_mode():
            model(ids[:, begin:end], past_key_values=cache)
        (segment,) = cache.enforcer.layers[0].main
        assert segment.key.tail.lengths == [end - max(0, end - 16) // 16 * 16] * 2
        assert all(16 <= n < 32 for n in segment.key.tail.lengths + segment.value.tail.lengths)


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_the_answer_is_that_of_plain_decoding(draft_tokens):
    model, ids = tiny_model("llama"), random_text(100)
    plain, cache = KVCache(model, POLICY), KVCache(model, POLICY)
    expected = model.generate(ids, past_key_values=plain, max_new_tokens=30, do_sample=False)[0, 100:].tolist()
    found = speculate(model, cache, ids, 30, draft_tokens)
    assert list(found.token_ids) == expected
    assert 0 < found.accepted <= found.drafted and found.acceptance == found.accepted / found.drafted
    assert cache.get_seq_length() == 129 and cache.seen == [129]
    cache.check_integrity()
    # It goes on from there.
    more = speculate(model, cache, torch.cat([ids, torch.tensor([expected])], dim=1), 5, draft_tokens)
    assert len(more.token_ids) == 5


def test_an_end_of_text_token_ends_it(monkeypatch):
    model, ids = tiny_model("llama"), random_text(100)
    answer = speculate(model, KVCache(model, POLICY), ids, 12).token_ids
    stop = answer[7]
    first = answer.index(stop)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [stop])
    cache = KVCache(model, POLICY)
    assert speculate(model, cache, ids, 12).token_ids == answer[: first + 1]
    assert cache.seen == [100 + first]


def test_a_draft_reads_less_and_leaves_the_cache_alone():
    model, ids = tiny_model("llama"), random_text(100)
    cache = KVCache(model, POLICY)
    cache.prefill(model, ids[:, :90])
    before, size = [s.main[0].keys().clone() for s in cache.enforcer.layers], cache.nbytes
    fork = drafting(cache)
    assert not torch.equal(fork.enforcer.layers[0].main[0].keys(), before[0])
    with torch.inference_mode():
        for i in range(90, 100):
            model(ids[:, i : i + 1], past_key_values=fork)
    assert all(torch.equal(s.main[0].keys(), keys) for s, keys in zip(cache.enforcer.layers, before, strict=True))
    assert cache.nbytes <= size and cache.seen == [90]


def test_what_cannot_be_drafted_is_refused():
    model, ids = tiny_model("llama"), random_text(20)
    with pytest.raises(PolicyError, match="use quantspec"):
        speculate(model, KVCache(model, "kivi"), ids)
    for number in (0, 2.5, "x"):
        with pytest.raises(PolicyError, match=f"draft_tokens={number}: give one"):
            speculate(model, KVCache(model, POLICY), ids, draft_tokens=number)
