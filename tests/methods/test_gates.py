"""Trained gates: what they compute, that training helps, and that scores do not depend on how a text is cut."""

import pytest
import torch
from brute import kept_positions
from torch.nn.functional import rms_norm

from kvbudget.cache import KVCache
from kvbudget.calibrate import build, calibrate
from kvbudget.calibrate.admission import distance
from kvbudget.calibrate.base import watch
from kvbudget.calibrate.gates import _highest, examples, kvzip_plus_scores, kvzip_scores
from kvbudget.errors import PolicyError, UnsupportedModel
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.gates import RetainingGate, SinkGate
from kvbudget.policy.view import View
from tiny import left_padded, random_text, tiny_model

TRAINED = ("fast_kvzip", "locret")
ALL = ("kvzap", *TRAINED, "wg_kv")
STEPS = {"kvzap": {}}
TEXTS = [random_text(96, seed=seed)[0] for seed in range(3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An artifact of each method for the same tiny model."""
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("gates")
    return {
        name: calibrate(
            name,
            model,
            folder / f"{name}.safetensors",
            texts=TEXTS,
            count=3,
            length=96,
            **STEPS.get(name, {"steps": 30}),
        )
        for name in ALL
    }


@pytest.mark.parametrize("name", TRAINED)
def test_training_beats_the_untrained_gate(name, files):
    model, ids = tiny_model("llama"), random_text(96, seed=9)
    fit = build(name, count=3, length=96)
    x, y, index = examples(fit, model, ids)
    trained = Artifact.load(name, fingerprint(model), files[name]).tensors
    untrained = {key.removeprefix("weight."): w for key, w in fit.start(model).items() if key.startswith("weight.")}
    losses = [
        float(fit.loss(fit.gate().score(x, {key: w[index] for key, w in weights.items()}), y))
        for weights in (trained, untrained)
    ]
    assert losses[0] < 0.8 * losses[1], losses


def test_the_trained_gate_beats_any_constant_and_ranks_as_kvzip_does(files):
    """Three texts are too few for the values of another one, but not for their order."""
    model, fit = tiny_model("llama"), build("fast_kvzip", count=3, length=96)
    trained = Artifact.load("fast_kvzip", fingerprint(model), files["fast_kvzip"]).tensors
    for ids, least in ((TEXTS[0], 0.5), (random_text(96, seed=9)[0], 0.15)):
        x, y, index = examples(fit, model, ids[None])
        scores = fit.gate().score(x, {key: w[index] for key, w in trained.items()})
        if ids is TEXTS[0]:
            assert fit.loss(scores, y) < 0.9 * fit.loss(y.mean(1, keepdim=True).expand_as(y), y)
        ranks = [z.argsort(1).argsort(1).float().mT.flatten(0, 1) for z in (scores, y)]
        assert all(float(torch.corrcoef(torch.stack(pair))[0, 1]) > least for pair in zip(*ranks, strict=True))


def test_the_linear_gate_is_the_best_one(files):
    """Least squares over all tokens of the three texts at once, with a row for each damped weight."""
    model = tiny_model("llama")
    found = Artifact.load("kvzap", fingerprint(model), files["kvzap"]).tensors
    fit = build("kvzap", count=3, length=96)
    pairs = [examples(fit, model, ids[None])[:2] for ids in TEXTS]
    x, y = (torch.cat(parts, 1).double() for parts in zip(*pairs, strict=True))
    for layer in range(2):
        ones = torch.ones(len(x[layer]), 1, dtype=torch.double)
        damped = torch.eye(x.shape[2], dtype=torch.double) * (fit.ridge * len(x[layer])) ** 0.5
        rows = torch.cat([torch.cat([x[layer], ones], 1), torch.nn.functional.pad(damped, (0, 1))])
        best = torch.linalg.lstsq(rows, torch.nn.functional.pad(y[layer], (0, 0, 0, x.shape[2]))).solution
        weights = torch.cat([found["weight"][layer], found["bias"][layer]]).double()
        torch.testing.assert_close(weights, best, atol=1e-3, rtol=1e-3)
        error = (fit.gate().score(x[layer], {"weight": best[:-1], "bias": best[-1:]}) - y[layer]).square().mean()
        assert float(error) < 0.8 * float(y[layer].var(0).mean())


def test_targets():
    """KVzip's own scores, and the highest attention from the end of the text."""
    model, ids = tiny_model("llama"), random_text(80)
    cache = KVCache(model, "kvzip(sinks=0)")
    cache.prefill(model, ids)
    expected = torch.stack([View(layer).state("score")[0].T for layer in cache.enforcer.layers])
    assert torch.equal(kvzip_scores(model, ids), expected) and expected.shape == (2, 80, 2)
    calls = {}
    attend = KVCache(model, "full")
    attend.probing = lambda index, call, lse, own: calls.update({index: (call, lse)})
    with torch.inference_mode():
        model.base_model(ids, past_key_values=attend)
    found = [_highest(call, lse, 60) for call, lse in calls.values()]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True).attentions
    for scores, weights in zip(found, attentions, strict=True):
        torch.testing.assert_close(
            scores.T, weights[0, :, 60:, :60].unflatten(0, (2, 2)).amax((1, 2)), atol=1e-5, rtol=1e-4
        )


def test_targets_by_what_values_add_to_the_output():
    """KVzip+ from the model's own eager attention over the text and itself, one query head and token at a time."""
    model, ids = tiny_model("llama"), random_text(40)
    found, inputs = kvzip_plus_scores(model, ids), {}
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.register_forward_pre_hook(
            lambda module, _, given: inputs.update({module.layer_idx: given["hidden_states"][0]}), with_kwargs=True
        )
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(ids.repeat(1, 2), output_attentions=True).attentions
    for index, weights in enumerate(attentions):
        attention, x = model.model.layers[index].self_attn, inputs[index]
        values = attention.v_proj(x)[:40].view(40, 2, 16)
        expected = torch.zeros(40, 2)
        for q in range(4):
            share = attention.o_proj.weight[:, q * 16 : (q + 1) * 16]
            scores = weights[0, q, 40:, :40] * (values[:, q // 2] @ share.T).norm(dim=-1) / x[40:].norm(dim=-1)[:, None]
            expected[:, q // 2] = expected[:, q // 2].maximum(scores.amax(0))
        torch.testing.assert_close(found[index], expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(UnsupportedModel, match="leave it out"):
        kvzip_plus_scores(tiny_model("gpt2"), ids)


def test_the_sink_gate():
    gate, generator = SinkGate(dim=4, sinks=3), torch.Generator().manual_seed(0)
    weights, x = gate.start(10, 2, 2, generator), torch.randn(5, 10)
    score = gate.score(x, weights)
    query = rms_norm((x @ weights["query"]).view(5, 2, 2, 4), (4,))
    key = rms_norm((x @ weights["key"]).view(5, 2, 4), (4,))
    for n in range(5):
        for h in range(2):
            logits = query[n, h] @ key[n, h] / 2
            base = query[n, h] @ weights["sink"][h].T / 2
            expected = (1 / (1 + (base - logits[:, None]).exp().sum(-1))).mean()
            assert abs(float(score[n, h] - expected)) < 1e-6
    alone = SinkGate(dim=4, sinks=1)
    weights = alone.start(10, 2, 1, generator) | {"sink": torch.zeros(2, 1, 4)}
    logit = (
        rms_norm((x @ weights["query"]).view(5, 2, 4), (4,)) * rms_norm((x @ weights["key"]).view(5, 2, 4), (4,))
    ).sum(-1) / 2
    torch.testing.assert_close(alone.score(x, weights), logit.sigmoid())
    assert bool(((score > 0) & (score < 1)).all())


@pytest.mark.parametrize("name", ALL)
def test_a_score_is_given_once_and_alone(name, files):
    """However the text comes, padded, in chunks or token by token, each entry has the score that its token has by itself."""
    model, texts = tiny_model("llama"), [random_text(70, seed=4), random_text(33, seed=5)]
    policy, budget = f"{name}(file={str(files[name])!r})", None if name in ("kvzap", "wg_kv") else 100
    scores = []
    for sizes in ([70], [20, 50], [60] + [1] * 10):
        cache = KVCache(model, policy, budget)
        begin = 0
        with torch.inference_mode():
            for size in sizes:
                model(texts[0][:, begin : begin + size], past_key_values=cache)
                begin += size
        scores.append(torch.stack([View(layer).state("score")[0] for layer in cache.enforcer.layers]))
    for other in scores[1:]:
        torch.testing.assert_close(scores[0], other, atol=1e-4, rtol=1e-3)
    ids, mask = left_padded(texts)
    batch = KVCache(model, policy, budget)
    batch.prefill(model, ids, attention_mask=mask, chunk_size=40)
    held = torch.stack([View(layer).state("score")[0] for layer in batch.enforcer.layers])
    torch.testing.assert_close(held, scores[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["kvzap", "wg_kv"])
def test_entries_below_the_threshold_leave_behind_the_window(name, files):
    model, ids, kept = tiny_model("llama"), random_text(120, seed=6), []
    for least in (-0.2, -1.0, -2.0, -3.0, -50.0) if name == "kvzap" else (0.999, 0.9, 0.5, 0.1, 0.0):
        rule = f"depth={-least}" if name == "kvzap" else f"admit={least}"
        cache = KVCache(model, f"{name}({rule}, sinks=0, window=16, every=1, file={str(files[name])!r})")
        cache.prefill(model, ids)
        cache.check_integrity()
        kept.append(cache.report().kept_entries)
        for layer, store in enumerate(cache.enforcer.layers):
            score = View(store).state("score")
            for h, row in enumerate(kept_positions(cache, layer)):
                assert row[-16:] == list(range(104, 120))
                assert bool((score[0, h, : len(row) - 16] >= least).all())
    assert kept == sorted(kept) and kept[0] < kept[-1] == 120 * 4
    cache = KVCache(
        model, f"{name}({'depth=1' if name == 'kvzap' else 'admit=0.5'}, window=16, file={str(files[name])!r})"
    )
    cache.prefill(model, ids)
    admitted = [set(row[:-16]) for layer in range(2) for row in kept_positions(cache, layer)]
    model.generate(torch.cat([ids, ids[:, :1]], dim=1), past_key_values=cache, max_new_tokens=40, do_sample=False)
    later = [set(row) for layer in range(2) for row in kept_positions(cache, layer)]
    assert all(before <= after for before, after in zip(admitted, later, strict=True)), "what was admitted stays"


def test_a_budget_raises_the_threshold_of_all_layers_and_heads_alike(files):
    model, ids = tiny_model("llama"), random_text(120, seed=6)
    caches = [KVCache(model, f"kvzap(depth=99, window=8, file={str(files['kvzap'])!r})", n) for n in (None, 40)]
    for cache in caches:
        cache.prefill(model, ids)
    kept, gone = [], []
    for layer, store in enumerate(caches[0].enforcer.layers):
        score = View(store).state("score")[0]
        for h, row in enumerate(kept_positions(caches[1], layer)):
            assert row[:4] == [0, 1, 2, 3] and row[-8:] == list(range(112, 120))
            held = torch.zeros(120, dtype=torch.bool).scatter(0, torch.tensor(row), True)[4:112]
            kept.append(score[h, 4:112][held])
            gone.append(score[h, 4:112][~held])
    assert caches[1].report().kept_entries == 4 * 40 and len({len(row) for row in kept}) > 1
    assert float(torch.cat(kept).min()) >= float(torch.cat(gone).max())


def test_what_admission_is_trained_for():
    """Gates of 1 change nothing, and gates of nearly 0 hide what is not local: all of it, or what they choose."""
    model, ids, calls = tiny_model("llama"), random_text(60), {}
    watch(model, ids, lambda index, call, lse: calls.update({index: call}))
    asked = torch.arange(20, 60)
    for call in calls.values():
        assert float(distance(call, asked, torch.ones(60, 2), 16)) == 0
        hard = torch.where(torch.rand(60, 2) < 0.5, 1.0, 1e-12)
        for gates in (torch.full((60, 2), 1e-12), hard):
            query = call.query[0][:, asked].unflatten(0, (2, 2))
            logits = torch.einsum("hgnd,htd->hgnt", query, call.key[0]) * call.scale
            steps = torch.arange(60)
            logits = logits.masked_fill(steps > asked[:, None], float("-inf"))
            seen = (asked[:, None] < steps + 16) | (gates.T[:, None, None] > 0.5)
            full, some = (
                torch.einsum("hgnt,htd->hgnd", x.softmax(-1), call.value[0])
                for x in (logits, logits.masked_fill(~seen, float("-inf")))
            )
            expected = (full - some).square().sum() / full.square().sum()
            torch.testing.assert_close(distance(call, asked, gates, 16), expected, atol=1e-5, rtol=1e-3)


def test_training_admission_lowers_its_error(files):
    model, ids = tiny_model("llama"), random_text(96, seed=9)
    fit = build("wg_kv", count=3, length=96, batch=90)
    trained = Artifact.load("wg_kv", fingerprint(model), files["wg_kv"]).tensors
    untrained = {key.removeprefix("weight."): w for key, w in fit.start(model).items() if key.startswith("weight.")}
    index, error = fit.lesson(model, ids)
    errors = [float(error(weights, torch.Generator().manual_seed(1))) for weights in (trained, untrained)]
    assert index.tolist() == [0, 1] and errors[0] < errors[1], errors


@pytest.mark.parametrize(("budget", "entries"), [(48, 48 * 4), ("24KiB", 400)])
@pytest.mark.parametrize("name", ["fast_kvzip", "locret"])
def test_budgets_hold_after_every_chunk_and_bytes_too(name, budget, entries, files):
    model, ids, held = tiny_model("llama"), random_text(200, seed=7), []
    policy = f"{name}({'window' if name == 'fast_kvzip' else 'recent'}=16, file={str(files[name])!r})"
    cache = KVCache(model, policy, budget)
    cache.prefill(model, ids, chunk_size=64, progress=lambda *_: held.append(cache.report().kept_entries))
    cache.check_integrity()
    assert len(held) > 3 and max(held) <= entries
    steps = model.generate(
        torch.cat([ids, ids[:, :1]], dim=1), past_key_values=cache, max_new_tokens=20, do_sample=False
    )
    cache.check_integrity()
    assert steps.shape[1] == 221 and cache.report().kept_entries <= entries


def test_refusals(tmp_path):
    with pytest.raises(PolicyError, match="calibrate locret"):
        KVCache(tiny_model("llama"), f"locret(file={str(tmp_path / 'none')!r})", 50)
    assert RetainingGate(7).start(4, 2, 1, torch.Generator())["inner"].shape == (4, 7)
