"""EpiCache: blocks against brute force, a bounded peak, clusters, and questions that find their episode."""

import pytest
import torch
from brute_plan import PlanBrute

from kvbudget.cache import KVCache
from kvbudget.episodes import Clusters, Episodes
from kvbudget.errors import PolicyError
from kvbudget.policy.clustering import kmeans
from kvbudget.policy.plans import Episode
from residency import resident_bytes
from tiny import random_text, tiny_model

POLICY = "epicache(block=50, episodes=2, window=20, medoids=3)"


def two_topics(length=120, seed=0):
    """Two topics with words of their own, by turns of 20 tokens: ids ``[1, length]``."""
    generator = torch.Generator().manual_seed(seed)
    turns = [
        torch.randint(1 + 64 * (i % 2), 60 + 64 * (i % 2), (20,), generator=generator) for i in range(length // 20)
    ]
    return torch.cat(turns)[None]


def highest(held, own):
    return [logits.softmax(-1).amax((0, 1)) for logits in held]


@pytest.mark.parametrize("uniform", [True, False])
def test_blocks_are_judged_by_the_episode(uniform):
    model, question = tiny_model("llama"), torch.tensor([[70, 80, 90]])
    policy = POLICY.replace(")", f", uniform={uniform})")
    counts = PlanBrute(highest, joint=not uniform).run(
        model, KVCache(model, policy, 40), two_topics(200), question_ids=question
    )
    assert [[sum(layer) for layer in block] for block in counts] == [[80, 80]] * 4
    assert uniform == all(row == [40, 40] for block in counts for row in block)


@pytest.mark.parametrize("budget", [60, "20KiB"])
def test_the_peak_is_the_budget_and_a_block(budget):
    model, ids = tiny_model("llama"), two_topics(600)
    cache, most = KVCache(model, POLICY, budget), []
    cache.prefill(model, ids, progress=lambda done, total: most.append(resident_bytes(cache)))
    cache.check_integrity()
    entry = cache.enforcer.cost.per_entry
    kept = cache.report().kept_entries
    reserved = 64  # entries that a row may have room for before its budget is known
    assert max(most) <= (kept + 2 * 2 * (50 + reserved)) * entry and kept < 600


def test_questions_find_their_topic():
    model, ids = tiny_model("llama"), two_topics(240)
    episodes = Episodes(model, ids, POLICY, 60)
    topics = [torch.tensor([[5, 30, 12, 40]]), torch.tensor([[100, 77, 90]])]
    routes = [episodes.route(question) for question in topics]
    assert sorted(routes) == [0, 1]
    for question, route in zip(topics, routes, strict=True):
        spoken = set(episodes.clusters.texts[route])
        assert all((token > 64) == (int(question[0, 0]) > 64) for token in spoken)
        alone = KVCache(model, POLICY, 60)
        alone.prefill(model, ids, question_ids=question)
        asked = torch.cat([ids, question], dim=1)
        answers = [
            model.generate(asked, past_key_values=c, max_new_tokens=4, do_sample=False)
            for c in (episodes.cache(question), episodes.cache(question), alone)
        ]
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert [cache.seen for cache in episodes.caches] == [[240], [240]]


def test_without_a_question_all_is_one_episode():
    model, ids = tiny_model("llama"), two_topics(120)
    plan = Episode(50, 2, 20, 3)
    alone = Clusters.of(model, ids[0].tolist(), plan, 1)
    assert len(alone.texts) == 1 and len(alone.texts[0]) == 60
    one = KVCache(model, POLICY.replace("episodes=2", "episodes=1"), 40)
    none = KVCache(model, POLICY, 40)
    expected = one.prefill(model, ids, question_ids=torch.tensor([[7]]))
    assert torch.equal(none.prefill(model, ids), expected)


def test_clusters():
    points = torch.cat([torch.randn(20, 4) * 0.1 + shift for shift in (0.0, 3.0, -3.0)])
    centers, labels = kmeans(points, 3)
    assert sorted(labels.bincount().tolist()) == [20, 20, 20] and len(set(labels[:20].tolist())) == 1
    torch.testing.assert_close(centers[labels[0]], points[:20].mean(0))
    again = kmeans(points, 3)
    assert torch.equal(centers, again[0]) and torch.equal(labels, again[1])
    assert len(kmeans(torch.ones(5, 2), 3)[0]) == 1 and len(kmeans(points[:2], 4)[0]) == 2


def test_refusals():
    model = tiny_model("llama")
    with pytest.raises(PolicyError, match="has no episodes"):
        Episodes(model, random_text(50), "snapkv", 40)
    with pytest.raises(PolicyError, match="cannot share"):
        Episodes(model, random_text(50, rows=2), POLICY, 40)
    with pytest.raises(PolicyError, match="must be at least 1"):
        KVCache(model, "epicache(block=0)", 40)
