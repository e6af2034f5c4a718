"""Codecs of heads and layers together under evicting methods: what is attended to, who votes, what is held in bytes."""

from pathlib import Path

import pytest
import torch
from brute import kept_positions
from test_calibrated import PINNED, POLICIES, calibrated
from test_registry import SMALL, feed
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.layer import FEW_TOKENS, AttentionCall
from kvbudget.methods import parse, registry
from kvbudget.models import fingerprint, rotation_of
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.selection import votes
from kvbudget.segments.selective import Reading
from tiny import left_padded, random_text, tiny_model

CODECS = ("xquant(group=16)", "xquant_cl(group=16)", "aquakv(residual=16)")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))


def fitted(model: PreTrainedModel) -> PreTrainedModel:
    """The model with maps for all three codecs, random predictors among them."""
    generator = torch.Generator().manual_seed(0)
    width, layers = 16 * model.config.num_key_value_heads, model.config.num_hidden_layers
    for method in ("xquant", "xquant_cl"):
        calibrate(method, model)
    maps = {
        f"{side}_map": 0.05 * torch.randn(layers, rows, width, generator=generator)
        for side, rows in (("key", width), ("value", 2 * width))
    }
    maps |= {f"{side}_bias": torch.zeros(layers, width) for side in ("key", "value")}
    Artifact("aquakv", fingerprint(model), maps, {}).save()
    return model


class Replayed:
    """Answers every attention call of a cache again, by a softmax over decoded tokens, or those selected, and compares.

    A token's codes depend on it alone (``unit=1``), so each is coded again from its keys and values as they came. ``mask [B, n]``
    are the tokens of the forward under way that are no padding.
    """

    mask: Tensor

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self.model, self.cache, self.calls, self.unread = model, cache, 0, 0
        self.raw: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        attend = cache.attend

        def attended(index: int, call: AttentionCall, *rest: object) -> Tensor:
            expected = [self.answer(index, b, call) for b in range(len(call.query))]
            out = attend(index, call, *rest)
            for b, (real, wanted) in enumerate(expected):
                torch.testing.assert_close(out[b][:, real], wanted, atol=2e-4, rtol=1e-3)
            return out

        cache.attend = attended  # type: ignore[method-assign]

    def answer(self, index: int, b: int, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Which of the queries are no padding, and their answers ``[Hq, n, Dv]``."""
        real = self.mask[b]
        query, key, value = (x[b][:, real] for x in (call.query, call.key, call.value))
        held = self.held(index, b)
        self.raw.setdefault((index, b), []).append((key, value))
        if held is not None:
            self.calls += 1
            key, value = torch.cat([held[0], key], dim=1), torch.cat([held[1], value], dim=1)
        heads, new = len(key), query.shape[1]
        query = query.unflatten(0, (heads, -1))
        later = torch.arange(key.shape[1]) > torch.arange(new)[:, None] + key.shape[1] - new
        logits = (query @ key[:, None].mT * call.scale).masked_fill(later, float("-inf"))
        weights, selector = logits.softmax(-1), self.cache.parts.selector
        if selector is not None and (selector.prefill or new <= FEW_TOKENS):
            asked = (x[None] for x in (query, key, value, logits, logits.logsumexp(-1), ~later.expand(heads, -1, -1)))
            (weights,) = selector.select(Reading(index, *asked, depth=float(index))).weights
            self.unread += int((weights == 0).sum() - later.expand_as(weights).sum())
        return real, (weights @ value[:, None]).flatten(0, 1)

    def held(self, index: int, b: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[Hkv, T, D]`` of what is held of sequence b in this layer, as its queries shall see them."""
        store = self.cache.layers[index].store
        if not store.main or not store.main[0].lengths[b * store.num_kv_heads]:
            return None
        row, seen, codec = b * store.num_kv_heads, store.seen[b], self.cache.parts.sharing.codec
        at = torch.cat([segment.meta.row("position", row) for segment in store.main]).long()
        assert kept_positions(self.cache, 0 if store.layer_idx == 0 else index, b) == [at.tolist()] * store.num_kv_heads
        coded = torch.cat([torch.arange(s.lengths[row]).sub(s.first.lengths[row]).ge(0)
                           & (torch.arange(s.lengths[row]) < s.coded[row]) for s in store.main])  # fmt: skip
        below, found = None, None
        for layer in store.together:
            key, value = (torch.cat(side, dim=1)[:, :seen] for side in zip(*self.raw[layer, b], strict=True))
            rotation = rotation_of(self.model, layer)
            bare = rotation.strip(key, torch.arange(seen))
            flat = [x.transpose(0, 1).flatten(1).float() for x in (bare, value)]
            k, v, below = codec.decode(layer, codec.encode(layer, *flat, below), below)
            if layer == index:
                k, v = (x.unflatten(1, (store.num_kv_heads, -1)).transpose(0, 1) for x in (k, v))
                places = torch.arange(seen - len(at), seen) if self.cache.parts.position_mode != "original" else at
                k = torch.where(coded[:, None], k[:, at], bare[:, at])
                found = rotation.embed(k, places), torch.where(coded[:, None], v[:, at], value[:, at])
        return found


def replay(model: PreTrainedModel, policy: str, budget: object, texts: list[Tensor], steps: int) -> KVCache:
    """A prompt in one forward (padded where texts differ in length), then single tokens, everything checked."""
    cache = KVCache(model, policy, budget)
    replayed = Replayed(model, cache)
    ids, mask = left_padded([text[:, :-steps] for text in texts])
    padded = not bool(mask.all())
    with torch.inference_mode():
        for begin in range(steps + 1):
            if begin:
                ids = torch.cat([text[:, text.shape[1] - steps + begin - 1 :][:, :1] for text in texts])
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]}
            replayed.mask = mask[:, -ids.shape[1] :].bool()
            model(ids, past_key_values=cache, **(options if padded else {}))
            cache.check_integrity()
    assert replayed.calls and (cache.parts.scorer is None or cache.enforcer.evictions > 1)
    assert cache.parts.selector is None or replayed.unread > 100
    return cache


def worth(model: PreTrainedModel, policy: str, entries: int, batch: int = 1) -> str:
    """The bytes that so many entries per layer and KV head need."""
    enforcer = KVCache(model, policy, "1GiB").enforcer
    heads = sum(layer.num_kv_heads for layer in enforcer.layers)
    return f"{batch * int(heads * (enforcer.cost.fixed + entries * enforcer.cost.per_entry) + 1)}B"


ATTENDED = [
    ("snapkv(window=8)+adakv", CODECS[0]),
    ("h2o+adakv", CODECS[2]),
    ("snapkv(window=8)+pyramidkv", CODECS[1]),
    ("snapkv(window=8)+adakv+pyramidkv", CODECS[2]),
    ("streaming_llm(sinks=4, positions='cache')", CODECS[0]),
    ("streaming_llm(sinks=4, positions='cache')", CODECS[2]),
    ("lacache(positions='cache')", CODECS[0]),
    ("lacache(positions='cache')", CODECS[1]),
    ("mpcache(size=4)", CODECS[2]),
    ("streaming_llm+kcache(top=8)", CODECS[1]),
]


@pytest.mark.parametrize(("policy", "codec"), ATTENDED)
def test_queries_attend_to_what_the_kept_tokens_decode_to(policy, codec):
    """In padded batches under a budget of entries, and in even ones under bytes, which hold at every step."""
    model = fitted(tiny_model("llama", num_attention_heads=2, num_key_value_heads=2))
    texts, policy = [random_text(n + 20, seed=n) for n in (90, 61)], f"{policy}+{codec}"
    for budget, rows in ((48, texts), (worth(model, policy, 48, 2), texts[:1] * 2)):
        cache = replay(model, policy, budget, rows, 20)
        assert all(segment.cells.total for segment in cache.enforcer.layers[0].main[-1:])


def test_selectors_read_a_part_of_what_is_coded_together_where_nothing_is_evicted():
    model = fitted(tiny_model("llama", num_attention_heads=2, num_key_value_heads=2))
    replay(model, "kcache(top=8)+aquakv(residual=16)", None, [random_text(n + 6, seed=n) for n in (90, 61)], 6)


def test_the_tokens_stay_that_heads_and_layers_want_most():
    """Against votes counted from the keys as they came: of one layer's heads, and of all layers with different shares."""
    model, ids = fitted(tiny_model("llama", num_key_value_heads=4)), torch.randperm(127)[None, :90] + 1
    full = KVCache(model)
    with torch.inference_mode():
        model(ids, past_key_values=full)
        scores = torch.stack([-layer.main[0].keys().norm(dim=-1) for layer in full.enforcer.layers])
        for policy in (
            "knorm+adakv+xquant(group=64)",
            "knorm+adakv+evolkv(weights=(3.0, 1.0))+aquakv",
            "knorm+pyramidkv+aquakv",
        ):
            cache = KVCache(model, policy, 30)
            model(ids, past_key_values=cache)
            (kept, *others), shares = (kept_positions(cache, layer) for layer in range(2)), cache.enforcer.shares(0)
            votes_of = []
            for layer, total in enumerate(shares):
                own, counts = scores[layer], [total // 4] * 4
                if cache.parts.heads is None:
                    own = own.mean(0, keepdim=True).expand(4, -1)
                else:
                    valid = torch.ones(4, 90, dtype=torch.bool)
                    counts = cache.parts.heads.split(own, ~valid, valid, total)
                ranks = own.argsort(dim=-1, descending=True).argsort(dim=-1)
                votes_of.append((torch.tensor(counts)[:, None] / (ranks + 1)).amax(0))
            if "xquant" not in policy:
                votes_of = [torch.stack(votes_of).amax(0)] * 2
            for found, wanted in zip((kept, *others), votes_of, strict=True):
                assert found == [sorted(wanted.argsort(descending=True, stable=True)[:30].tolist())] * 4, policy


JURIES = (
    "snapkv(window=8)+adakv+xquant_cl(group=16)",
    "cake(window=8)+aquakv(residual=16)",
    "kvzap(window=8, depth=0)+aquakv(residual=16)",
)


@pytest.mark.parametrize("policy", JURIES)
def test_padded_rows_equal_their_single_runs_and_forks_and_files_go_on_alike(policy, tmp_path):
    model = fitted(calibrated())
    texts = [random_text(n, seed=n) for n in (40, 90, 67)]
    ids, mask = left_padded(texts)
    ids, mask = torch.cat([ids, random_text(6, rows=3)], dim=1), torch.cat([mask, torch.ones(3, 6).long()], dim=1)
    batch = KVCache(model, policy, 48)
    logits = feed(model, batch, ids, [90] + [1] * 6, mask)
    for b, text in enumerate(texts):
        single, text = KVCache(model, policy, worth(model, policy, 48)), torch.cat([text, ids[b : b + 1, -6:]], dim=1)
        expected = feed(model, single, text, [text.shape[1] - 6] + [1] * 6)
        torch.testing.assert_close(logits[b : b + 1, mask[b].bool()], expected, atol=2e-4, rtol=0)
    fork, drafted, more = single.fork(), single.fork(), random_text(8)
    single.save(tmp_path / "cache.kv")
    drafted.activate_past_recording()
    with torch.inference_mode():
        model(random_text(4, seed=1), past_key_values=drafted)
        drafted.crop(-4)
        model(more[:, :3], past_key_values=drafted)
        drafted.crop(0)
    feed(model, single, more, [3])
    for layer in range(2):
        assert kept_positions(drafted, layer) == kept_positions(single, layer)
    loaded, expected = KVCache.load(tmp_path / "cache.kv", model), feed(model, single, more[:, 3:], [1] * 5)
    for other in (fork, loaded):
        torch.testing.assert_close(feed(model, other, more, [3] + [1] * 5)[:, 3:], expected, atol=1e-5, rtol=0)
    batch.batch_select_indices(torch.tensor([2, 0, 0, 1]))
    batch.check_integrity()
    assert kept_positions(batch, 1, 1) == kept_positions(batch, 0, 2)
    batch.reset()
    assert not batch.nbytes


def test_a_vote_is_the_share_of_its_entries_at_which_a_head_would_let_one_go():
    """Against ranks counted entry by entry, with protected and empty cells; the highest vote of the heads counts."""
    scores = torch.randn(2, 3, 30)
    protected, valid = torch.zeros(2, 3, 30, dtype=torch.bool), torch.ones(2, 3, 30, dtype=torch.bool)
    protected[0, :, -4:], valid[1, :, 20:] = True, False
    counts = torch.tensor([[14, 4, 9], [3, 0, 12]])
    found = votes(scores, protected, valid, counts)
    assert torch.equal(found[:, :1].expand_as(found), found)
    for b in range(2):
        fixed = int(protected[b, 0].sum())
        free = (valid & ~protected)[b, 0].nonzero().flatten().tolist()
        wanted = dict.fromkeys(free, 0.0)
        for h in range(3):
            for r, t in enumerate(sorted(free, key=lambda t: -float(scores[b, h, t]))):
                wanted[t] = max(wanted[t], (int(counts[b, h]) - fixed) / (r + 1))
        assert found[b, 0, free].tolist() == pytest.approx([wanted[t] for t in free])


@pytest.mark.parametrize("codec", ["xquant_cl", "aquakv"])
@pytest.mark.parametrize("destination", ["mikv", "d2o", "cam", "lattice(slots=8)", "transformer_vq(codes=8)"])
def test_destinations_take_what_leaves_each_of_the_layers_that_are_coded_together(destination, codec):
    """Where all layers keep the same tokens by themselves, and nothing is coded yet, it is the method without the codec."""
    model, ids = fitted(tiny_model("llama")), random_text(110)
    found = []
    for policy in (f"streaming_llm+{destination}", f"streaming_llm+{destination}+{codec}"):
        cache = KVCache(model, policy, 40)
        found.append(feed(model, cache, ids, [60, 38] + [1] * 12))
        assert cache.enforcer.evictions > 1
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_layers_that_follow_hand_on_what_leaves_them_with_their_leaders_scores(monkeypatch):
    """They take no statistics of their own, so theirs would all be zero."""
    model = fitted(tiny_model("llama", num_hidden_layers=3))
    cache, found = KVCache(model, "windowkv(window=8, group=2)+cam+aquakv", 40), []
    monkeypatch.setattr(type(cache.parts.destination), "receive", lambda _, layer, left: found.append(left.score))
    feed(model, cache, random_text(90), [90])
    assert len(found) == 3 and all(bool(score.any()) for score in found)
    assert torch.equal(found[1], found[0]) and not torch.equal(found[2], found[0])


NEVER = {
    "chai": "heads that share keys",
    "kv_heads": "mixtures of the model's",
    "retro_attention": "every entry as it was",
}
STACKED = NEVER | {"pyramidinfer": "layers above"}
WHOLE = ("duo_attention", "razor_attention")
"""Every layer of the model has a head that keeps everything."""
OWN = {
    term.name: text
    for text in (*POLICIES, *PINNED)
    for term in parse(text).recipes
    if term.name not in ("snapkv", "h2o")
}
OWN |= {
    "finch": "finch(window=8)",
    "laq": "laq(first=8)",
    "epicache": "epicache(block=32, window=8, episodes=2, medoids=2)",
    "kvzip": "kvzip(chunk=32, instruction_ids=(1, 2))",
    "pyramidinfer": "pyramidinfer(window=8)",
    "chelsea": "chelsea(recent=8)",
    "razor_attention": "razor_attention(window=16)",
    "duo_attention": "duo_attention(sinks=4, recent=8)",
}
METHODS = [name for name, kind in registry().items() if kind.role not in ("codec", "sharing map", "baseline")]


@pytest.mark.parametrize("codec", CODECS)
def test_every_evicting_method_goes_with_every_joint_codec_or_says_why_not(codec):
    model, ids = fitted(calibrated()), random_text(84)
    refused = NEVER if codec == CODECS[0] else STACKED
    for name in METHODS:
        policy = OWN.get(name, SMALL.get(name, name))
        if parse(policy).parts().scorer is None:
            policy = f"snapkv(window=8)+{policy}"
        policy = f"{policy}+{codec}"
        if name in refused:
            with pytest.raises(PolicyError, match=refused[name]):
                KVCache(model, policy, 48)
            continue
        if name in WHOLE:
            with pytest.raises(BudgetError, match="all that are coded with it"):
                KVCache(model, policy, "60%")
        planned = parse(policy).prefill_peak == "full_prompt"
        budget = None if name in WHOLE else 40 if planned else worth(model, policy, 60)
        cache = KVCache(model, policy, budget)
        cache.prefill(model, ids[:, :80], **({} if cache.parts.plan else {"chunk_size": 40}))
        feed_on(model, cache, ids[:, 80:])
        assert name in WHOLE or cache.enforcer.evictions, policy


def feed_on(model: PreTrainedModel, cache: KVCache, ids: Tensor) -> None:
    """Single tokens; the integrity, bytes among it, checked after each."""
    with torch.inference_mode():
        for token in ids.split(1, dim=1):
            assert bool(model(token, past_key_values=cache).logits.isfinite().all())
            cache.check_integrity()
    for layer in range(len(cache.enforcer.layers)):
        rows = kept_positions(cache, layer)
        assert rows == rows[:1] * len(rows)
