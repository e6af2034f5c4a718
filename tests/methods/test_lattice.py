"""Lattice: its writing rule by a plain loop, what is known turns nothing, equal values come back, constant size."""

import pytest
import torch
from brute import chunks
from test_registry import feed
from test_transformer_vq import receive

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.policy.destinations.slots import Slots
from kvbudget.segments.base import AttendContext
from tiny import random_text, tiny_model


def held(rule: Slots, key, value) -> tuple[LayerCache, torch.Tensor]:
    layer = LayerCache(0, 2)
    layer.start(1)
    receive(layer, rule, key[:, : rule.codes], value[:, : rule.codes])  # the codebook
    receive(layer, rule, key[:, rule.codes :], value[:, rule.codes :], rule.codes)
    return layer, layer.front[0].meta.padded("value")


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_slots_are_those_of_one_entry_after_the_other(rate):
    torch.manual_seed(0)
    codes = torch.randn(4, 6)
    at = torch.cat([torch.arange(4), torch.randint(4, (40,))])
    key, value = codes[at].repeat(2, 1, 1), 2 + torch.randn(2, 44, 5)
    layer, slots = held(Slots(4, rate, 1), key, value)
    found = {tuple(k.tolist()): v for k, v in zip(layer.front[0].meta.padded("key")[1], slots[1], strict=True)}
    for c in range(4):
        slot, n = None, 0
        for v in value[1][at == c]:
            n += 1
            if slot is None:
                slot = v
                continue
            norm, step = slot.norm(), max(rate, 1 / n)
            unit = slot / norm
            turn = (torch.eye(5) - torch.outer(unit, unit)) @ (v - slot) / norm
            assert abs(float(turn @ unit)) < 1e-6 * max(1.0, float(turn.norm()))
            slot = torch.nn.functional.normalize(unit + step * turn, dim=0) * (norm + step * (v @ unit - norm))
        torch.testing.assert_close(found[tuple(codes[c].tolist())], slot, atol=1e-5, rtol=1e-4)


def test_what_a_slot_holds_turns_nothing_and_equal_values_come_back():
    torch.manual_seed(1)
    key, value = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    for rule in (Slots(3, 0.0, 4), Slots(3, 0.5, 1)):
        layer, slots = held(rule, key.repeat(1, 4, 1), value.repeat(1, 4, 1))
        torch.testing.assert_close(slots, value, atol=1e-5, rtol=1e-4)
        query = torch.randn(2, 4, 6)
        answer = layer.front[0].attend(query, AttendContext(0.5))
        torch.testing.assert_close(answer.out, (query @ key.mT * 0.5).softmax(-1) @ value, atol=1e-5, rtol=1e-4)
    before = slots[0, 0]
    receive(layer, rule, key[:, :1], 3 * before.expand(2, 1, 5))
    after = layer.front[0].meta.padded("value")[0, 0]
    torch.testing.assert_close(after / after.norm(), before / before.norm())
    assert after.norm() > 1.5 * before.norm()


def test_the_size_stays_constant():
    model = tiny_model("llama")
    cache = KVCache(model, "snapkv(window=8)+lattice(slots=6)", "36KiB")
    for _ in range(2):
        feed(model, cache, random_text(150), chunks(150, 50))
        assert cache.layers[0].store.front[0].lengths == [6, 6]
    with pytest.raises(PolicyError, match="slots=0"):
        KVCache(model, "lattice(slots=0)", 64)
