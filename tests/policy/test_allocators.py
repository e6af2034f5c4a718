"""Allocators through the enforcer: weights share out what is not protected, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.costs import EntryCost
from kvbudget.enforcer import Enforcer
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.methods import parse
from kvbudget.methods.compresskv import CompressKV
from kvbudget.methods.duo_attention import DuoAttention
from kvbudget.methods.epicache_layers import EpiCacheLayers
from kvbudget.methods.headkv import HeadKV
from kvbudget.methods.knorm import KeyNorm
from kvbudget.policy.allocators.heads import JointTopK
from kvbudget.policy.allocators.layers import Uniform
from kvbudget.policy.base import LayerAllocator, Parts, Protect, Recipe
from kvbudget.policy.policy import Policy
from tiny import random_text, tiny_model


@dataclass(frozen=True)
class Fixed(LayerAllocator):
    """Given weights."""

    given: tuple[float, ...] = ()

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return list(self.given)


@dataclass(frozen=True)
class Measured(Fixed):
    """The measured statistic is the weight."""

    measures = True

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return [weight or 0.0 for weight in measured]


def enforcer(allocator, budget, *, layers=4, seen=1000, protect=Protect(), heads=None, spans=()):  # noqa: B008
    stores = [LayerCache(index, 2) for index in range(layers)]
    for store in stores:
        store.start(1)
        store.seen = [seen]
    parts = Parts(scorer=KeyNorm(), layers=allocator, heads=heads, protect=protect)
    return Enforcer("test", parts, Budget.parse(budget), stores, EntryCost(10.0, 3.0), spans=list(spans))


def test_weights_share_out_what_is_not_protected():
    shares = enforcer(Fixed((3.0, 1.0, 1.0, 3.0)), 100, protect=Protect(sinks=4, recent=16)).shares(0)
    assert [share // 2 for share in shares] == [20 + 120, 20 + 40, 20 + 40, 20 + 120]


@given(
    weights=st.lists(st.floats(0, 1e3), min_size=2, max_size=6),
    tokens=st.integers(22, 300),
    seen=st.integers(1, 400),
    ragged=st.booleans(),
)
def test_totals_are_exact_inside_floors_and_caps(weights, tokens, seen, ragged):
    heads = JointTopK() if ragged else None
    protect = Protect(sinks=4, recent=16)
    built = enforcer(Fixed(tuple(weights)), tokens, layers=len(weights), seen=seen, protect=protect, heads=heads)
    shares = built.shares(0)
    assert sum(shares) == 2 * len(weights) * min(tokens, seen)
    assert all(2 * min(20, seen) <= share <= 2 * seen for share in shares)


def test_bytes_buy_entries_at_their_price():
    # 4 layers of 2 heads: 24 bytes are fixed, and each entry costs 10.
    shares = enforcer(Uniform(), "2024B").shares(0)
    assert sum(shares) == 200 and len(set(shares)) == 1


def test_layers_that_were_not_measured_leave_their_part_to_the_others():
    built = enforcer(Measured(), 100, protect=Protect(recent=10))
    built.measured = [[2.0], [1.0], [], []]
    shares = [share // 2 for share in built.shares(0)]
    assert shares[2:] == [0, 0] and sum(shares) == 400
    assert shares[0] - 10 == pytest.approx(2 * (shares[1] - 10), abs=2)
    built.measured = [[2.0], [1.0], [1.0], []]
    assert all(new <= old for new, old in zip(built.shares(0)[:2], [2 * s for s in shares], strict=False))
    built.measured = [[], [], [], []]
    assert len(set(built.shares(0))) == 1


def test_marked_spans_are_in_every_layer():
    shares = enforcer(Fixed((1.0, 0.0, 0.0, 0.0)), 100, spans=[(50, 80)]).shares(0)
    assert [share // 2 for share in shares] == [400 - 3 * 31, 31, 31, 31]


def test_joint_topk_with_short_and_empty_rows():
    scores = torch.rand(3, 50)
    valid = torch.arange(50) < torch.tensor([50, 3, 0])[:, None]
    nothing = torch.zeros_like(valid)
    assert JointTopK().split(scores, nothing, valid, 100) == [50, 3, 0]
    counts = JointTopK(safeguard=1.0).split(scores, nothing, valid, 30)
    assert sum(counts) == 30 and counts[1] == 3 and counts[2] == 0


def test_negative_scores_compete_too():
    scores = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert JointTopK(safeguard=0.0).split(scores, nothing, ~nothing, 3) == [3, 0]


def test_a_role_is_filled_once_and_aligned_scorers_have_no_heads_to_share():
    with pytest.raises(PolicyError, match="cake and pyramidkv both decide the layers"):
        parse("cake+pyramidkv")
    with pytest.raises(PolicyError, match="adakv has nothing to share out"):
        parse("adakv+tova")


GIVEN: dict[str, Recipe] = {
    "headkv": HeadKV(shares=((0.4, 1.9), (1.2, 0.5))),
    "duo_attention": DuoAttention(sinks=4, recent=0, retrieval=((1,), ())),
    "compresskv": CompressKV(least=8, heads=((1,), (2,)), importance=(0.3, 0.7)),
    "epicache_layers": EpiCacheLayers(similarity=(0.9, 0.6)),
}


@pytest.mark.parametrize(
    "allocator",
    [
        "pyramidkv",
        "pyramidinfer(window=8)",
        "zigzagkv(window=16)",
        "dynamickv",
        "cake(window=16)",
        "prefixkv",
        "adakv",
        "evolkv(weights=(3.0, 1.0))",
        *GIVEN,
    ],
)
def test_every_allocator_goes_with_any_scorer(allocator, monkeypatch):
    """Totals are exact, and a larger budget takes entries from no layer."""
    for kind in map(type, GIVEN.values()):  # as if from a calibration
        monkeypatch.setattr(kind, "bind", lambda self, fingerprint: self)
    model, ids = tiny_model("llama"), random_text(100)
    own = GIVEN[allocator] if allocator in GIVEN else parse(allocator).recipes[0]
    for scorer in ("snapkv(window=16)", "knorm", "keydiff", "h2o", "streaming_llm"):
        smaller = [0, 0]
        for budget in (52, 64):
            cache = KVCache(model, Policy((parse(scorer).recipes[0], own)), budget)
            with torch.inference_mode():
                model(ids, past_key_values=cache)
            ranks = getattr(cache.parts.scorer, "scorer", cache.parts.scorer)  # pyramidinfer takes its mean over heads
            assert type(ranks) is type(parse(scorer).parts().scorer)
            kept = [sum(rows) for (rows,) in cache.report().kept]
            assert sum(kept) == cache.report().kept_entries == 4 * budget
            assert all(more >= less for more, less in zip(kept, smaller, strict=True))
            smaller = kept


def test_what_brings_a_scorer_along_takes_another():
    for method in ("cake", "d2o"):
        own, other = parse(method).parts(), parse(f"knorm+{method}").parts()
        assert isinstance(other.scorer, KeyNorm) and not isinstance(own.scorer, KeyNorm) and other.protect == Protect()
        assert other.destination == own.destination
    assert parse("knorm+cake").parts().layers == parse("cake").parts().layers
    assert parse("knorm+d2o").parts().layers is None, "D2O's shares are made of accumulated attention"
