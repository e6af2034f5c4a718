"""Shared layers answer as a model whose layers read the owner's keys and values; they are held once, forked and evicted once."""

import pytest
import torch
from brute import chunks, kept_positions, run
from test_registry import feed
from torch import Tensor
from transformers import DynamicCache

from kvbudget import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.methods import parse
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.sharing import Mixed
from residency import resident_bytes
from tiny import left_padded, random_text, tiny_model

LAYERS = 5


class Reading(DynamicCache):
    """Transformers' own cache, in which a layer gets the keys and values of its owner."""

    def __init__(self, owners: list[int]) -> None:
        super().__init__()
        self.owners, self.given = owners, {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object) -> object:
        if self.owners[layer_idx] == layer_idx:
            self.given[layer_idx] = super().update(key, value, layer_idx)
        return self.given[self.owners[layer_idx]]


def model(name: str = "llama", **options: object):
    return tiny_model(name, num_hidden_layers=LAYERS, **options)


def expected(ids: Tensor, owners: list[int]) -> Tensor:
    with torch.inference_mode():
        return model()(ids, past_key_values=Reading(owners)).logits


@pytest.mark.parametrize("sizes", [[90], [40, 41, 1, 3, 5], [70] + [1] * 20], ids=len)
@pytest.mark.parametrize("owners", [[0, 0, 2, 2, 4], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], ids=str)
def test_readers_attend_to_what_their_owner_holds(owners, sizes):
    ids = random_text(90)
    served = model()
    cache = KVCache(served, f"cla(owners={tuple(owners)})" if owners[1] or owners[2] == 0 else "cla")
    found = feed(served, cache, ids, sizes)
    torch.testing.assert_close(found, expected(ids, owners), atol=1e-4, rtol=0)
    held = sum(owner == i for i, owner in enumerate(owners))
    report = cache.report()
    assert len(report.kept) == held and sum(report.parts.values()) == report.nbytes == resident_bytes(cache)
    full = KVCache(served)
    feed(served, full, ids, sizes)
    assert report.nbytes * LAYERS == full.nbytes * held and report.full_bytes == full.report().full_bytes


def test_one_layer_per_group_is_the_model_itself_and_more_are_not():
    ids = random_text(50)
    with torch.inference_mode():
        own = model()(ids).logits
    for policy, same in (("cla(factor=1)", True), ("cla", False), ("mixattention(every=1, caches=5, window=8)", True)):
        served = model()
        found = feed(served, KVCache(served, policy), ids, [30, 20])
        assert torch.allclose(found, own, atol=1e-4) is same


def test_the_layers_of_mixattention():
    assert Mixed(8, 3).windows(7) == [0, 8, 8, 0, 8, 8, 0] and Mixed(8, 3).owners(7) == [0, 1, 1, 0, 4, 4, 0]
    pairs = Mixed(8, 3, first=1, caches=2, run=1)
    assert pairs.windows(8) == [8, 0, 8, 8, 0, 8, 8, 0] and pairs.owners(8) == [0, 1, 2, 3, 1, 5, 6, 7]


def test_windows_are_those_of_masked_attention_and_count_as_a_floor():
    """Windows as wide as the text change nothing; narrow ones are masks, and bound what is held."""
    ids = random_text(120)
    served = model()
    step = torch.arange(120)
    near = (step <= step[:, None]) & (step > step[:, None] - 16)
    masked = model()
    for index in (1, 3):
        masked.model.layers[index].self_attn.register_forward_pre_hook(
            lambda module, args, options: (args, options | {"attention_mask": near[None, None]}), with_kwargs=True
        )
    with torch.inference_mode():
        windowed = masked(ids, past_key_values=Reading([0, 1, 0, 3, 0])).logits
    wide = feed(served, KVCache(served, "mixattention(every=2, window=120)"), ids, [100] + [1] * 20)
    torch.testing.assert_close(wide, expected(ids, [0, 1, 0, 3, 0]), atol=1e-4, rtol=0)
    narrow = KVCache(served, "mixattention(every=2, window=16)")
    chunked = feed(served, narrow, ids, chunks(100, 30) + [1] * 20)
    once = feed(served, KVCache(served, "mixattention(every=2, window=16)"), ids, [120])
    torch.testing.assert_close(chunked, windowed, atol=1e-4, rtol=0)
    torch.testing.assert_close(once, windowed, atol=1e-4, rtol=0)
    held = [max(store.kept()[0]) for store in narrow.stores]
    assert held[0] == 120 and 15 <= min(held[1:]) <= max(held[1:]) <= 15 + 64
    budgeted = KVCache(served, "knorm+mixattention(every=2, window=16)", "48KiB")
    run(served, budgeted, ids, [64, 36] + [1] * 20)
    assert budgeted.enforcer.evictions and budgeted.enforcer.overhead == 2 * 79 * (2 * 2 * 16 * 4 + 4 * 2)
    with pytest.raises(BudgetError, match="sliding windows"):
        KVCache(served, "knorm+mixattention(every=2, window=16)", "40000B")


@pytest.mark.parametrize(
    ("scorer", "budget"), [("cake(window=8)", 40), ("snapkv(window=8)+adakv+kivi(residual=32)", "60KiB")]
)
def test_the_owner_is_evicted_once_and_rows_equal_their_single_runs(scorer, budget):
    served, policy = model(), f"{scorer}+cla(owners=(0, 1, 0, 3, 1))"
    texts = [random_text(n, seed=n) for n in (60, 120, 97)]
    ids, mask = left_padded(texts)
    ids, mask = torch.cat([ids, random_text(5, rows=3)], dim=1), torch.cat([mask, torch.ones(3, 5).long()], dim=1)
    batch = KVCache(served, policy, budget if budget == 40 else "180KiB")
    logits = feed(served, batch, ids, [120] + [1] * 5, mask)
    assert len(batch.enforcer.layers) == 3 and (batch.enforcer.evictions >= 3 or "kivi" in scorer)
    for b, text in enumerate(texts):
        single = KVCache(served, policy, budget)
        alone = feed(served, single, torch.cat([text, ids[b : b + 1, -5:]], dim=1), [text.shape[1]] + [1] * 5)
        assert [kept_positions(batch, layer, b) for layer in range(3)] == [kept_positions(single, i) for i in range(3)]
        torch.testing.assert_close(logits[b : b + 1, mask[b].bool()], alone, atol=1e-4, rtol=0)


def test_forks_crops_and_chosen_sequences():
    served, ids = model(), random_text(80, rows=2)
    cache = KVCache(served, "cla(owners=(0, 1, 0, 1, 0))")
    feed(served, cache, ids[:, :70], [70])
    before = cache.nbytes
    fork = cache.fork()
    assert len(fork.stores) == 2 and fork.layers[2].store is fork.layers[0].store is not cache.layers[0].store
    assert resident_bytes([cache, fork]) <= before
    one, other = feed(served, cache, ids[:, 70:], [1] * 10), feed(served, fork, ids[:, 70:], [10])
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    cache.crop(-10)
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    again = feed(served, cache, ids[[1, 1, 0], 70:], [4, 6])
    torch.testing.assert_close(again, one[[1, 1, 0]], atol=1e-4, rtol=0)
    cache.reset()
    torch.testing.assert_close(feed(served, cache, ids, [80])[:, 70:], one, atol=1e-4, rtol=0)
    text = random_text(12).repeat(1, 5)
    plain, guessed = (
        served.generate(
            text,
            past_key_values=KVCache(served, "snapkv(window=8)+cla", 200),
            max_new_tokens=20,
            do_sample=False,
            **options,
        )
        for options in ({}, {"prompt_lookup_num_tokens": 4})
    )
    assert guessed.tolist() == plain.tolist()


def test_maps_that_cannot_be_followed_are_refused():
    served = model()
    for owners in ("(0, 2, 2, 3, 4)", "(0, 0, 1, 3, 4)"):
        with pytest.raises(PolicyError, match="cannot read the entries"):
            KVCache(served, f"cla(owners={owners})")
    with pytest.raises(PolicyError, match="a map of 2 layers"):
        KVCache(served, "cla(owners=(0, 0))")
    with pytest.raises(PolicyError, match="read whole"):
        KVCache(served, "mpcache+cla", 64)
    with pytest.raises(PolicyError, match="both decide the sharing"):
        parse("cla+mixattention")
    sliding = tiny_model("gemma2", num_hidden_layers=4)  # only the full layers take part
    cache = KVCache(sliding, "cla")
    run(sliding, cache, random_text(90), [60] + [1] * 30)
    assert [layer.store.layer_idx for layer in cache.layers] == [0, 1, 2, 1]
    hybrid = tiny_model("qwen3_next")
    feed(hybrid, KVCache(hybrid, "cla"), random_text(50), [50])


def test_a_model_with_a_map_of_its_own_is_served_by_it(tmp_path):
    """Gemma 3n: upper layers have no keys of their own, and share one window and one full cache."""
    served, ids = tiny_model("gemma3n", num_hidden_layers=6), random_text(110)
    policy = "snapkv(window=8)+pyramidkv+kivi(residual=32)"
    cache = KVCache(served, policy, "88KiB")
    feed(served, cache, ids, [60, 40])
    assert [layer.store.layer_idx for layer in cache.layers] == [0, 1, 2, 3, 2, 3]
    assert len(cache.report().kept) == 2 and cache.enforcer.evictions
    cache.save(tmp_path / "saved")
    one = feed(served, cache, ids[:, 100:], [1] * 10)
    torch.testing.assert_close(feed(served, KVCache.load(tmp_path / "saved", served), ids[:, 100:], [1] * 10), one)
    for policy, message in (("cla", "a map of its own"), ("kcache", "read whole"), ("pyramidinfer", "sliding windows")):
        with pytest.raises(PolicyError, match=message):
            KVCache(served, policy, 64)


def test_the_search_shares_the_most_different_layers(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    served = model()
    texts = [random_text(24, seed=s)[0] for s in range(4)]
    given = {"texts": texts, "count": 4, "length": 24, "share": 0.4}
    path = calibrate("kvsharer", served, threshold=0.0, **given)
    owners = Artifact.load("kvsharer", fingerprint(served), path).tensors["owners"].tolist()
    caches = []
    for ids in texts:
        past = DynamicCache()
        with torch.inference_mode():
            model()(ids[None], past_key_values=past)
        caches.append([(layer.keys[0], layer.values[0]) for layer in past.layers])
    mean = [
        [torch.stack([c[i][k] for c in caches]).mean(0).transpose(0, 1).flatten(1) for k in (0, 1)]
        for i in range(LAYERS)
    ]
    order = sorted(
        (
            (sum((mean[i][k] - mean[j][k]).norm(dim=-1).mean() for k in (0, 1)), i, j)
            for i in range(LAYERS)
            for j in range(i)
        ),
        reverse=True,
    )
    plain = list(range(LAYERS))
    for _, i, j in order:
        if sum(o != at for at, o in enumerate(plain)) < 2 and plain[i] == i:
            plain = [plain[j] if o == i else o for o in plain]
    assert owners == plain and sum(o != at for at, o in enumerate(owners)) == 2
    cache = KVCache(served, "kvsharer")
    found = feed(served, cache, random_text(60), [60])
    torch.testing.assert_close(found, expected(random_text(60), owners), atol=1e-4, rtol=0)
    strict = Artifact.load("kvsharer", fingerprint(served), calibrate("kvsharer", served, threshold=1.0, **given))
    assert strict.tensors["owners"].tolist() == list(range(LAYERS)), "no map is good enough"
