"""A2ATS: codes know no position and are found once, the queries' metric finds more, and reading all is full attention."""

import torch
from brute import run

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.codecs.codebook import nearest
from kvbudget.models import rotations_of
from kvbudget.policy.selectors import codes
from kvbudget.policy.selectors.codes import Retrieved
from kvbudget.policy.view import View
from kvbudget.segments.selective import Reading
from tiny import random_text, tiny_model

WORDS = 16


def reading(rule: Retrieved, query: torch.Tensor, plain: torch.Tensor, rotation, step: int) -> Reading:
    """One query ``[D]`` at position ``step`` of one head that holds keys before RoPE ``plain [T, D]`` at positions from 0 on."""
    positions = torch.arange(len(plain))[None, None]
    keys = rotation.embed(plain, positions[0, 0])
    keys = keys.view(1, 1, len(plain), -1)
    asked = rotation.embed(query, torch.tensor(step)).view(1, 1, 1, 1, -1)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", asked, keys)
    visible = torch.ones(1, 1, 1, len(plain), dtype=torch.bool)
    states = {"code": torch.zeros(1, 1, len(plain))}
    rule.meet(0, keys, positions, states)
    lse, steps = logits.logsumexp(-1), torch.tensor([[step]])
    return Reading(0, asked, keys, keys, logits, lse, visible, steps=steps, positions=positions, states=states)


def found_for(words: torch.Tensor, factor: torch.Tensor, rotation) -> dict:
    return {
        "words": words[None, None], "factor": factor[None, None], "inv_freq": rotation.inv_freq[None],
        "interleaved": torch.tensor(False), "scaling": torch.tensor(1.0), "base": torch.tensor(200),
    }  # fmt: skip


def test_scores_are_products_with_the_nearest_word_wherever_the_key_is():
    rotation = rotations_of(tiny_model("llama"))[0]
    generator = torch.Generator().manual_seed(0)
    words, plain, query = (torch.randn(n, 16, generator=generator) for n in (WORDS, 90, 1))
    factor = torch.linalg.cholesky(torch.eye(16) + 3 * torch.ones(16, 16))
    rule = Retrieved(0.1, 8, 2, found_for(words, factor, rotation))
    asked = reading(rule, query[0], plain, rotation, 89)
    scores = rule.scores(asked)[0, 0, 0, 0]
    distance = ((plain[:, None] - words[None]) @ factor).square().sum(-1)
    expected = words[distance.argmin(1)] @ rotation.embed(query[0], torch.tensor(200))
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)
    read = rule.select(asked).weights[0, 0, 0, 0] > 0
    best = scores.clone()
    best[:2] = best[82:] = -torch.inf
    assert read[:2].all() and read[82:].all() and int(read.sum()) == 2 + 8 + 9
    assert bool(read[best.argsort(descending=True, stable=True)[:9]].all())
    everything = Retrieved(1.0, 8, 2, rule.found).select(asked).weights
    torch.testing.assert_close(everything, asked.probabilities)


def test_the_metric_of_the_queries_finds_more_of_the_best_keys(tmp_path):
    """Keys are loud where no query looks; codes in the queries' metric ignore that."""
    rotation = rotations_of(tiny_model("llama"))[0]
    generator = torch.Generator().manual_seed(1)
    scale = torch.ones(16)
    scale[::2] = 12.0
    plain, queries = (
        torch.randn(400, 16, generator=generator) * scale,
        torch.randn(60, 16, generator=generator) / scale**2,
    )
    turned = rotation.rotate(queries, torch.tensor(0))
    factor = torch.linalg.cholesky(turned.T @ turned / 60 + 1e-6 * torch.eye(16))
    recall = []
    for metric in (factor, torch.eye(16)):
        picked = plain @ metric
        words = plain[:64].clone()
        for _ in range(10):
            codes = nearest(picked[None], (words @ metric)[None])[0]
            words = torch.stack(
                [plain[codes == i].mean(0) if bool((codes == i).any()) else words[i] for i in range(64)]
            )
        scores = queries @ words[nearest(picked[None], (words @ metric)[None])[0]].T
        best = (queries @ plain.T).topk(20).indices
        recall.append(float(torch.zeros(60, 400).scatter(1, best, 1).gather(1, scores.topk(20).indices).mean()))
    assert recall[0] > 1.3 * recall[1], recall


def test_through_the_cache_reading_all_is_exact_and_less_is_less(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model, ids = tiny_model("llama"), random_text(150)
    texts = [random_text(60, seed=n)[0] for n in (1, 2)]
    calibrate("a2ats", model, texts=texts, count=2, length=60, words=WORDS, steps=4)
    with torch.inference_mode():
        expected = model(ids).logits[:, 140:]
    errors = []
    for share in (1.0, 0.3, 0.02):
        found = run(model, KVCache(model, f"a2ats(share={share}, window=8, sinks=2)"), ids, [140] + [1] * 10)[:, 140:]
        errors.append(float((found - expected).abs().max()))
    assert errors[0] < 1e-4 < errors[1] < 2 * errors[2], errors


def test_a_key_is_coded_once_and_its_code_goes_with_it(tmp_path, monkeypatch):
    """Over a padded batch, an eviction and forks, codes are those of the keys held, and only new keys are ever coded."""
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model, ids = tiny_model("llama"), random_text(100, rows=2)
    calibrate("a2ats", model, texts=[random_text(60)[0]], count=1, length=60, words=WORDS, steps=2)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    cache, coded = KVCache(model, "h2o+a2ats(share=0.1, window=8, sinks=2)", 50), []
    monkeypatch.setattr(codes, "nearest", lambda x, words: (coded.append(x.shape[1]), nearest(x, words))[1])
    with torch.inference_mode():
        model(ids[:, :90], attention_mask=mask[:, :90], past_key_values=cache)
        assert not coded
        for begin in range(90, 100):
            past = cache.fork() if begin == 95 else cache
            model(ids[:, begin : begin + 1], attention_mask=mask[:, : begin + 1], past_key_values=past)
            cache = past
    layers, rows = model.config.num_hidden_layers, 2
    assert sorted(set(coded)) == [1, 51] and coded.count(51) == layers * rows
    for layer in cache.enforcer.layers:
        view = View(layer)
        states = {"code": torch.zeros_like(view.positions).float()}
        cache.parts.selector.meet(layer.layer_idx, view.keys, view.positions, states)
        kept = view.state("code")
        assert torch.equal(kept[view.valid], states["code"][view.valid]) and bool((kept[view.valid] > 0).all())
