"""Q-Filters: directions against a singular value decomposition, selection against brute force."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from brute import Brute, Step, chunks, run, with_newest
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.calibrate.queries import QueryDirections
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    return tmp_path


def queries(model: PreTrainedModel, texts: Sequence[Tensor]) -> dict[int, Tensor]:
    """Post-RoPE queries ``[Hq, N, D]`` of every layer over the texts."""
    found: dict[int, list[Tensor]] = {}
    for ids in texts:
        cache = KVCache(model, "full")
        attend = cache.attend

        def keep(index: int, call: AttentionCall, *args: object, attend=attend) -> Tensor:
            found.setdefault(index, []).append(call.query[0].double())
            return attend(index, call, *args)

        cache.attend = keep
        run(model, cache, ids[None], [len(ids)])
    return {index: torch.cat(parts, dim=1) for index, parts in found.items()}


def calibrated(model: PreTrainedModel, number: int = 3) -> Tensor:
    texts = [random_text(80, seed=s)[0] for s in range(number)]
    path = calibrate("qfilters", model, texts=texts, count=number, length=80)
    return Artifact.load("qfilters", fingerprint(model), path).tensors["filters"]


def test_filters_are_the_first_singular_vectors():
    model = tiny_model("llama")
    filters = calibrated(model)
    for layer, query in queries(model, [random_text(80, seed=s)[0] for s in range(3)]).items():
        vectors = []
        for x in query:
            _, _, v = torch.linalg.svd(x, full_matrices=False)
            vectors.append(v[0] * (1 if (x @ v[0]).mean() > 0 else -1))
        expected = torch.stack(vectors).unflatten(0, (2, -1)).mean(1)
        torch.testing.assert_close(filters[layer].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_shared_direction_is_recovered_with_its_sign(sign):
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0)
    noise = torch.randn(1, 4, 3000, 16, generator=torch.Generator().manual_seed(1))
    x = sign * 2.0 * direction + 0.7 * noise
    state = {"square": (x.transpose(-1, -2) @ x).repeat(2, 1, 1, 1), "sum": x.sum(2).repeat(2, 1, 1)}
    found = QueryDirections().finish(tiny_model("llama"), state)["filters"]
    cosine = torch.nn.functional.cosine_similarity(found, sign * direction, dim=-1)
    assert found.shape == (2, 2, 16) and cosine.min() > 0.99


def projecting(filters: Sequence[Tensor], recent: int):
    """Keeps the highest projections; layers take turns."""
    layer = 0

    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        nonlocal layer
        rows = filters[layer % len(filters)].double()
        layer += 1
        scores = [(head.keys * row).sum(-1) for head, row in zip(step.heads, rows, strict=True)]
        rows = zip(step.heads, scores, strict=True)
        return [with_newest(score, head.positions, step.seen - recent, limit) for head, score in rows]

    return rule


@pytest.mark.parametrize("recent", [0, 8])
def test_keys_along_the_filters_stay(recent):
    model = tiny_model("llama")
    filters = calibrated(model)
    cache = KVCache(model, f"qfilters(recent={recent})", 24, when="every(1)")
    run(model, cache, random_text(150), chunks(142, 50) + [1] * 8, Brute(projecting(list(filters), recent), 24))


def test_the_projection_orders_keys_as_their_mean_attention_does():
    """Queries that share a direction, which random models lack: the projection then beats the key norm."""
    model = tiny_model("llama", attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.copy_(3.0 * torch.randn(64, generator=torch.Generator().manual_seed(2)))
    calibrated(model)
    ranks = {}
    for text in ("qfilters", "knorm", "h2o"):
        cache = KVCache(model, text, 1000)
        run(model, cache, random_text(200, seed=7), [200])
        scores = []
        for layer in cache.enforcer.layers:
            view = View(layer)
            seen_by = 200 - view.positions if text == "h2o" else 1
            scores.append(cache.parts.scorer.score(view) / seen_by)
        ranks[text] = torch.cat(scores)[..., :190].flatten(0, 1).argsort(-1).argsort(-1).float()

    def agreement(one: Tensor, other: Tensor) -> float:
        return float(torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(one, other, strict=True)]).mean())

    projected = agreement(ranks["qfilters"], ranks["h2o"])
    assert projected > 0.2 and projected > agreement(ranks["knorm"], ranks["h2o"]) + 0.2
    assert agreement(-ranks["qfilters"], ranks["h2o"]) < -0.2, "the other sign keeps the wrong half"


def test_artifacts_of_other_models_are_refused(cache_folder):
    model = tiny_model("llama")
    with pytest.raises(PolicyError, match="kvbudget calibrate qfilters --model"):
        KVCache(model, "qfilters", 64)
    calibrated(model)
    (file,) = (cache_folder / "calibration").iterdir()
    with pytest.raises(PolicyError, match="another model"):
        KVCache(tiny_model("llama", seed=1), f"qfilters(file='{file}')", 64)
