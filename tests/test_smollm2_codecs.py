"""Codecs on the real model: how far each may be from the full cache on real text, and what their papers rest on."""

import pytest
import torch

import kvbudget
from kvbudget.codecs.integer import ChannelQuant
from kvbudget.eval.fidelity import continuation_logits
from kvbudget.eval.rate import measure
from kvbudget.eval.replay import record, replay
from kvbudget.eval.texts import passages
from kvbudget.models import rotation_of

pytestmark = [pytest.mark.model, pytest.mark.slow]
CONTEXT, NEW = 1024, 128


@pytest.fixture(scope="module")
def text():
    """The model, a recorded context, its continuation, and what the full cache makes of it."""
    model, tokenizer = kvbudget.load("smollm2-135m")
    (ids,) = passages(tokenizer, CONTEXT + NEW, 1)
    recording, continuation = record(model, ids[None, :CONTEXT]), ids[None, CONTEXT:]
    whole = replay(recording, kvbudget.KVCache(model, "full"))
    return model, recording, continuation, continuation_logits(model, whole, recording.logits, continuation)


@pytest.mark.parametrize(("policy", "kl"), [("int8", 1e-3), ("bf16", 1e-3), ("posit16", 1e-3), ("posit8", 1e-2)])
def test_eight_bits_and_more_are_next_to_the_full_cache(text, policy, kl):
    assert measure(text[0], text[1], policy, *text[2:])[1].kl_mean < kl


def test_four_bits_of_kivi_lose_less_than_a_fiftieth_of_a_nat(text):
    assert abs(measure(text[0], text[1], "kivi(bits=4)", *text[2:])[1].nll_rise) < 0.02


def test_corrections_bring_two_bits_closer(text):
    plain, corrected = (
        measure(text[0], text[1], f"gear(bits=2{terms})", *text[2:])[1].kl_mean
        for terms in (", sparsity=0, rank=0", "")
    )
    assert corrected < 0.7 * plain


def test_channels_of_keys_are_even_before_their_rotation(text):
    """Per-channel codes lose less before RoPE than after it (KVQuant, section 3.1), over a whole text."""
    model, recording = text[0], text[1]
    codec, error = ChannelQuant(bits=3, unit=CONTEXT, residual=CONTEXT), {"before": 0.0, "after": 0.0}
    for index, call in recording.calls.items():
        rotation = rotation_of(model, index)
        for key in call.key[0].float():
            for name, x in (("after", key), ("before", rotation.strip(key, torch.arange(CONTEXT)))):
                error[name] += float((codec.decode(codec.encode(x)) - x).square().mean())
    assert error["before"] < 0.9 * error["after"]
