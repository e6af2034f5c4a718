"""Transformer-VQ: dense attention over quantized keys, exact while codewords last, the same in any order, constant size."""

import pytest
import torch
from brute import chunks
from test_registry import feed

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.policy.base import Evicted
from kvbudget.policy.destinations.codewords import Codewords
from kvbudget.segments.base import AttendContext
from tiny import random_text, tiny_model


def receive(layer: LayerCache, rule: Codewords, key, value, begin=0) -> None:
    """Entries ``[2 rows, N, D]`` leave both rows of a layer."""
    n = key.shape[1]
    position = torch.arange(begin, begin + n).int().repeat(2)
    rule.receive(layer, Evicted(key.flatten(0, 1), value.flatten(0, 1), position, torch.zeros(2 * n), [n, n]))


@pytest.mark.parametrize("pieces", [[60], [20, 25, 15], [5, 3, 52], [1] * 60], ids=len)
def test_what_is_held_is_attention_over_quantized_keys(pieces):
    torch.manual_seed(0)
    layer, rule = LayerCache(0, 2), Codewords(8)
    layer.start(1)
    key, value, query = torch.randn(2, 60, 6), torch.randn(2, 60, 5), torch.randn(2, 4, 6)
    begin = 0
    for n in pieces:
        receive(layer, rule, key[:, begin : begin + n], value[:, begin : begin + n], begin)
        begin += n
    (segment,) = layer.front
    assert segment.lengths == [8, 8] and segment.meta.padded("count").sum(1).tolist() == [60, 60]
    assert segment.meta.padded("position").amax(1).tolist() == [59, 59]
    found, codes = segment.attend(query, AttendContext(0.7)), segment.meta.padded("key")
    for row in range(2):
        if pieces[0] <= 8:
            assert torch.equal(codes[row], key[row, :8]), "the first keys are the codebook"
        quantized = codes[row][(key[row][:, None] - codes[row][None]).square().sum(-1).argmin(1)]
        logits = query[row] @ quantized.T * 0.7
        torch.testing.assert_close(found.lse[row], logits.logsumexp(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.out[row], logits.softmax(-1) @ value[row], atol=1e-5, rtol=0)


def test_once_the_codebook_is_full_order_does_not_matter():
    torch.manual_seed(1)
    key, value = torch.randn(2, 50, 6), torch.randn(2, 50, 5)
    held = []
    for order in (torch.arange(40), torch.randperm(40)):
        layer, rule = LayerCache(0, 2), Codewords(10)
        layer.start(1)
        receive(layer, rule, key[:, :10], value[:, :10])
        for at in order.split(7):
            receive(layer, rule, key[:, 10 + at], value[:, 10 + at], 10)
        held.append([layer.front[0].meta.padded(name) for name in ("key", "value", "count")])
    for one, other in zip(*held, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_exact_while_there_are_as_many_codewords_as_keys():
    model, ids = tiny_model("llama"), random_text(110)
    with torch.inference_mode():
        expected = model(ids).logits
    found = feed(
        model, KVCache(model, "snapkv(window=8)+transformer_vq(codes=110)", 24), ids, chunks(100, 40) + [1] * 10
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_the_size_stays_constant_and_equal_keys_need_one_codeword():
    model = tiny_model("llama")
    cache = KVCache(model, "transformer_vq(codes=8)", "36KiB")
    sizes = []
    for length in (150, 150):
        feed(model, cache, random_text(length), chunks(length, 50))
        sizes.append(cache.nbytes)
    assert cache.layers[0].store.front[0].lengths == [8, 8] and sizes[1] <= sizes[0]
    layer, rule = LayerCache(0, 2), Codewords(3)
    layer.start(1)
    key, value = torch.randn(2, 3, 6).repeat(1, 5, 1), torch.randn(2, 15, 5)
    receive(layer, rule, key, value)
    query = torch.randn(2, 4, 6)
    logits = query @ key.mT
    found = layer.front[0].attend(query, AttendContext(1.0))
    torch.testing.assert_close(found.out, logits.softmax(-1) @ value, atol=1e-5, rtol=1e-4)
    with pytest.raises(PolicyError, match="codes=0"):
        KVCache(model, "transformer_vq(codes=0)", 64)
