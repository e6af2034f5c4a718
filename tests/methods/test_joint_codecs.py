"""Codecs of heads and layers together under evicting methods: what is attended to, who votes, what is held in bytes."""

from pathlib import Path

import pytest
import torch
from brute import kept_positions
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.layer import AttentionCall
from kvbudget.models import fingerprint, rotation_of
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.selection import votes
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
    """Answers every attention call of a cache again, by a softmax over decoded tokens, and compares.

    A token's codes depend on it alone (``unit=1``), so each is coded again from its keys and values as they came. ``mask [B, n]``
    are the tokens of the forward under way that are no padding.
    """

    mask: Tensor

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self.model, self.cache, self.calls = model, cache, 0
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
        logits = query.unflatten(0, (heads, -1)) @ key[:, None].mT * call.scale
        later = torch.arange(key.shape[1]) > torch.arange(new)[:, None] + key.shape[1] - new
        weights = logits.masked_fill(later, float("-inf")).softmax(-1)
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
    assert replayed.calls and cache.enforcer.evictions > 1
    return cache


def worth(model: PreTrainedModel, policy: str, entries: int, batch: int = 1) -> str:
    """The bytes that so many entries per layer and KV head need."""
    enforcer = KVCache(model, policy, "1GiB").enforcer
    heads = sum(layer.num_kv_heads for layer in enforcer.layers)
    return f"{batch * int(heads * (enforcer.cost.fixed + entries * enforcer.cost.per_entry) + 1)}B"


ATTENDED = (
    "snapkv(window=8)+adakv",
    "streaming_llm(sinks=4)+adakv",
    "h2o+adakv",
    "streaming_llm(sinks=4, positions='cache')",
    "lacache(positions='cache')",
)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("policy", ATTENDED)
def test_queries_attend_to_what_the_kept_tokens_decode_to(policy, codec):
    model = fitted(tiny_model("llama", num_attention_heads=2, num_key_value_heads=2))
    texts = [random_text(n + 40, seed=n) for n in (90, 61)]
    policy = f"{policy}+{codec}"
    for budget, rows in ((48, texts), (worth(model, policy, 48, 2), texts[:1] * 2)):
        cache = replay(model, policy, budget, rows, 40)
        assert all(segment.cells.total for segment in cache.enforcer.layers[0].main[-1:])


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
