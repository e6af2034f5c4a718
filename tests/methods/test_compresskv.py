"""CompressKV: votes of selected heads against brute force, layer budgets, and the calibration."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from brute import Brute, Step, chunks, run, with_newest
from induction import repeating_model
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import PolicyError
from kvbudget.methods.compresskv import CompressKV
from kvbudget.models import fingerprint
from kvbudget.policy.allocators.importance import ByImportance
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    return tmp_path


def with_heads(model, heads: Sequence[Sequence[int]], importance: Sequence[float], **options: object) -> CompressKV:
    tensors = {"heads": torch.tensor(heads), "importance": torch.tensor(importance)}
    Artifact("compresskv", fingerprint(model), tensors, {}).save()
    return CompressKV(**options)


def voted(heads: Sequence[Sequence[int]], window: int = 8, kernel: int = 5):
    """Votes of the named query heads, shared by all KV heads; layers take turns."""
    layer = 0

    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        nonlocal layer
        chosen = heads[layer % len(heads)]
        layer += 1
        rows = torch.cat(step.weights)[list(chosen)][:, -window:].sum(1).mean(0)
        kept = []
        for head in step.heads:
            head.memory = max(0.0, 1 - step.new / window) * head.memory + rows
            older = head.memory[head.positions < step.seen - window]
            if len(older):
                older = avg_pool1d(older[None], kernel, stride=1, padding=kernel // 2)[0]
            scores = torch.cat([older, torch.zeros(len(head.memory) - len(older))])
            kept.append(with_newest(scores, head.positions, step.seen - window, limit))
        return kept

    return rule


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [([[3, 1], [0, 2]], [100] + [1] * 10), ([[3, 1], [0, 2]], chunks(100, 40) + [1] * 6), ([[0, 1, 2, 3]] * 2, [120])],
    ids=["steps", "chunks", "all heads: snapkv with one set"],
)
def test_the_selected_heads_vote_for_all(heads, sizes):
    model = tiny_model("llama")
    cache = KVCache(model, with_heads(model, heads, [0.5, 0.5]), 40, when="every(1)")
    run(model, cache, random_text(sum(sizes)), sizes, Brute(voted(heads), 40))


def test_other_heads_have_no_say():
    ids, rows = random_text(120), []
    for seed in (0, 7):
        model = tiny_model("llama", num_hidden_layers=1)
        other = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
        model.model.layers[0].self_attn.q_proj.weight[16:32] = other  # query head 1
        cache = KVCache(model, with_heads(model, [[0, 2]], [1.0]), 30)
        run(model, cache, ids, [120])
        rows.append(View(cache.enforcer.layers[0]).positions)
    assert rows[0].equal(rows[1])


def test_budgets_follow_the_importance_and_sum_up():
    model = tiny_model("llama", num_hidden_layers=4)
    importance = [0.1, 0.2, 0.3, 0.4]
    policy = with_heads(model, [[0]] * 4, importance, least=16)
    cache = KVCache(model, policy, 60)
    run(model, cache, random_text(300), [300])
    lengths = [rows[0][0] for rows in cache.report().kept]
    assert sum(lengths) == 4 * 60
    for n, share in zip(lengths, importance, strict=True):
        assert abs(n - (16 + share * (4 * 60 - 4 * 16))) <= 1
    assert ByImportance().weights([None] * 3, 50.0, 9.0) == [42.0] * 3
    top = ByImportance((1.0, 0.0, 0.0, 0.0), 32).weights([None] * 4, 100.0, 1.0)
    assert top[0] == 300.0 and top[1:] == [32.0] * 3


def test_a_head_that_repeats_is_found_and_texts_that_are_not_repeated_do_not_count():
    model = repeating_model()
    texts = [torch.randperm(127, generator=torch.Generator().manual_seed(s))[:100] + 1 for s in range(3)]
    path = calibrate("compresskv", model, texts=texts, count=3, length=100, passage=12, cue=4, number=1)
    found = Artifact.load("compresskv", fingerprint(model), path).tensors
    assert found["heads"][1].tolist() == [0] and found["importance"].sum() == pytest.approx(1.0)
    span = found["scores"]
    assert span[1, 0] > 0.5 * 3 * 8 and span[1, 0] > span[1, 1]
    # The other head looks into the passage, too, at the token before the one that is said: as a copying head it is none.
    assert span[1, 1] > 8 > 2 * span[0].max()
    plain = tiny_model("llama")
    with pytest.raises(PolicyError, match=r"repeated no passage.*longer cue="):
        calibrate("compresskv", plain, texts=texts, count=3, length=100, passage=12, cue=4, number=1)


def test_impossible_parameters_are_refused():
    model = tiny_model("llama")
    with pytest.raises(PolicyError, match="kvbudget calibrate compresskv"):
        KVCache(model, "compresskv", 64)
    with pytest.raises(PolicyError, match="most="):
        KVCache(model, "compresskv(most=0.5)", 64)
    with pytest.raises(PolicyError, match="do not fit texts"):
        calibrate("compresskv", model, texts=[random_text(20)[0]], count=1, length=20, cue=30)
