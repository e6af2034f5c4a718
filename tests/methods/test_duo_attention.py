"""DuoAttention: the calibration against eager attention, and the limits of its two kinds of heads."""

from pathlib import Path

import pytest
import torch
from brute import kept_positions, run
from induction import induction_model

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import PolicyError
from kvbudget.methods import parse
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from tiny import random_text, tiny_model

CHANGE = torch.tensor([[0.5, 0.1], [0.2, 0.9]])


@pytest.fixture(autouse=True)
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    Artifact("duo_attention", fingerprint(tiny_model("llama")), {"change": CHANGE}, {}).save()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_change_is_that_of_masked_attention(name):
    model, length, passage = tiny_model(name), 90, 12
    ids = random_text(length)[0]
    options = {"count": 1, "length": length, "passage": passage, "sinks": 4, "recent": 16}
    path = calibrate("duo_attention", model, texts=[ids], **options)
    found = Artifact.load("duo_attention", fingerprint(model), path).tensors["change"]
    plain = tiny_model(name)
    plain.set_attn_implementation("eager")
    whole = torch.cat([ids, ids[4 : 4 + passage]])[None]
    values = {}
    for index, layer in enumerate(plain.model.layers):
        layer.self_attn.v_proj.register_forward_hook(lambda m, i, out, index=index: values.update({index: out[0]}))
    with torch.inference_mode():
        attention = plain(whole, output_attentions=True).attentions
    j = torch.arange(length + passage)
    i = j[-passage:, None]
    near = (j <= i) & ((j < 4) | (j > i - 16))
    for layer, weights in enumerate(attention):
        if name == "gemma2" and layer % 2 == 0:
            assert bool((found[layer] == -1).all())
            continue
        weights = weights[0, :, -passage:].unflatten(0, (2, -1))
        value = values[layer].unflatten(-1, (2, -1)).transpose(0, 1)[:, None]
        full, part = weights @ value, weights * near
        part = part / part.sum(-1, keepdim=True) @ value
        expected = (full - part).norm(dim=(2, 3)).norm(dim=1) / full.norm(dim=(2, 3)).norm(dim=1)
        torch.testing.assert_close(found[layer], expected, atol=1e-4, rtol=1e-3)


def test_a_head_that_looks_far_back_is_found():
    """Layer 1 of the hand-made induction model finds earlier tokens; layer 0 looks at the previous one."""
    model = induction_model()
    texts = [torch.randperm(127, generator=torch.Generator().manual_seed(s))[:110] + 1 for s in range(2)]
    attention = model.transformer.h[1].attn
    attention.c_attn.weight[:128, 640:768] = torch.eye(128)
    path = calibrate("duo_attention", model, texts=texts, count=2, length=110, passage=10, sinks=2, recent=30)
    change = Artifact.load("duo_attention", fingerprint(model), path).tensors["change"]
    assert change[1, 0] > 0.5 and change[0].max() < 0.05


def test_two_kinds_of_heads_and_their_memory():
    model, ids = tiny_model("llama"), random_text(150)
    cache = KVCache(model, "duo_attention(sinks=4, recent=20)")
    run(model, cache, ids[:, :100], [100])
    assert [layer[0] for layer in cache.report().kept] == [[100, 24], [24, 100]]
    for seen in range(101, 151):
        run(model, cache, ids[:, seen - 1 : seen], [1])
        (whole, few), (others, all_of_them) = kept_positions(cache, 0), kept_positions(cache, 1)
        assert whole == all_of_them == list(range(seen)) and few == others
        # Three are evicted ahead, so that steps do not pay for an eviction each.
        assert 24 - 3 <= len(few) < 24 and few == [*range(4), *range(seen - len(few) + 4, seen)]


def test_no_streaming_head_is_exact_and_only_streaming_heads_are_streaming_llm():
    model, ids = tiny_model("llama"), random_text(120)
    with torch.inference_mode():
        expected = model(ids).logits
    exact = run(model, KVCache(model, "duo_attention(sparsity=0.0, sinks=4, recent=20)"), ids, [80] + [1] * 40)
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=0)
    duo, streaming = (
        KVCache(model, "duo_attention(sparsity=1.0, sinks=4, recent=20)", when="every(1)"),
        KVCache(model, "streaming_llm", 24, when="every(1)"),
    )
    torch.testing.assert_close(*(run(model, cache, ids, [80] + [1] * 40) for cache in (duo, streaming)))
    short = KVCache(model, "duo_attention(sinks=64, recent=256)")
    torch.testing.assert_close(run(model, short, ids, [120]), expected, atol=1e-4, rtol=0)


def test_a_budget_pays_for_the_retrieval_heads_first_and_any_scorer_may_choose():
    model = tiny_model("llama")
    cache = KVCache(model, "snapkv(window=8)+duo_attention(recent=0)", 90)
    run(model, cache, random_text(140), [120] + [1] * 20)
    kept = [layer[0] for layer in cache.report().kept]
    assert kept[0][0] == kept[1][1] == 140 and sum(map(sum, kept)) <= 4 * 90 and kept[0][1] > 20


def test_impossible_parameters_are_refused():
    with pytest.raises(PolicyError, match="sparsity="):
        parse("duo_attention(sparsity=1.5)")
    with pytest.raises(PolicyError, match="nothing to miss"):
        calibrate("duo_attention", tiny_model("llama"), texts=[random_text(60)[0]], count=1, length=60)
