"""The budget is hard: after every forward the tensors that a cache keeps alive, found by walking it, fit inside."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache as memoized
from itertools import chain, pairwise, repeat

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget import KVCache, methods
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.policy.base import Recipe, Trigger
from residency import model_tensors, resident_bytes
from tiny import HYBRID, SUPPORTED, left_padded, random_text, tiny_model

# Windows and residuals that a text of 150 tokens fills.
SMALL = {"window": 8, "residual": 32, "lag": 16}
COMPOSITIONS = (
    "streaming_llm(positions='cache')",
    "knorm(recent=5)",
    "snapkv(window=8)+pyramidkv+adakv",
    "snapkv(window=8)+adakv+kivi(bits=4, residual=32)",
    "knorm+kivi(bits=2, residual=32, group=16)",
    "streaming_llm+kivi(bits=2, bits_v=4, group=16, residual=16)",
)


def policy_text(kind: type[Recipe]) -> str:
    """The method with small windows, after a scorer where it has none of its own."""
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    recipe = kind(**{name: value for name, value in SMALL.items() if name in names})
    judges = "scorer" in recipe.parts() or "scorer" in recipe.defaults()
    return str(recipe) if judges else f"snapkv(window=8)+{recipe}"


def runs_bare(kind: type[Recipe]) -> bool:
    """Whether a bare forward under a byte budget is all that the method needs."""
    return kind.prefill_peak == "bounded" and not {"plan", "calibration", "driver"} & set(kind.needs)


BOUNDED = [policy_text(kind) for kind in methods().values() if runs_bare(kind)]
POLICIES = (*BOUNDED, *COMPOSITIONS)


@memoized
def model_of(name: str) -> PreTrainedModel:
    return tiny_model(name)


def text(batch: int, length: int) -> tuple[Tensor, Tensor | None]:
    """One text, or a left-padded batch of texts whose lengths differ widely."""
    if batch == 1:
        return random_text(length), None
    lengths = [length, length * 3 // 4, *[1] * (batch - 2)]
    return left_padded([random_text(n, seed=seed) for seed, n in enumerate(lengths)])


def chunks(sizes: Iterable[int], length: int) -> Iterator[tuple[int, int]]:
    begin = 0
    for size in sizes:
        yield begin, min(begin + size, length)
        begin += size
        if begin >= length:
            return


def feed(model: PreTrainedModel, cache: KVCache, ids: Tensor, mask: Tensor | None, begin: int, end: int) -> None:
    extra = {} if mask is None else {"attention_mask": mask[:, :end]}
    with torch.no_grad():
        model(ids[:, begin:end], past_key_values=cache, **extra)


def drive(model: PreTrainedModel, cache: KVCache, batch: int, sizes: Iterable[int], length: int) -> None:
    """Feeds a text in chunks of these sizes and checks the bytes after each."""
    ids, mask = text(batch, length)
    foreign = model_tensors(model)
    for begin, end in chunks(sizes, length):
        feed(model, cache, ids, mask, begin, end)
        resident = resident_bytes(cache, foreign)
        assert resident <= cache.budget.amount, f"{resident} bytes after tokens {begin}:{end}"
        assert resident == cache.nbytes, "the cache does not know of all that it keeps"
        cache.check_integrity()


def named_bytes(error: pytest.ExceptionInfo[BudgetError]) -> int:
    match = re.search(r"at least (\d+)B", str(error.value))
    assert match, f"no smallest budget is named: {error.value}"
    return int(match[1])


def smallest(model: PreTrainedModel, policy: str, batch: int = 1) -> int:
    """The smallest budget by the cache's own account: what it names when it refuses less."""
    with pytest.raises(BudgetError) as error:
        KVCache(model, policy, "1B")
    single = named_bytes(error)
    if batch == 1:
        return single
    cache = KVCache(model, policy, f"{single}B")
    ids, mask = text(batch, 20)
    with pytest.raises(BudgetError, match=f"for {batch} sequences") as error:
        feed(model, cache, ids, mask, 0, 20)
    assert cache.nbytes == 0 and not cache.seen, "refused after some work"
    feed(model, cache, ids[:1], None, 0, 20)  # what was refused has left no trace
    return named_bytes(error)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_forward_ends_inside_the_budget(policy: str, batch: int) -> None:
    model = model_of("llama")
    least = smallest(model, policy, batch)
    cache = KVCache(model, policy, f"{least}B" if batch == 3 else f"{least * 33 // 32}B")
    drive(model, cache, batch, chain([64, 1, 7, 7], repeat(1, 10), [30, 7, 3]), 129)
    assert cache.enforcer.evictions


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_architecture_ends_inside_the_budget(name: str) -> None:
    model, policy = model_of(name), "snapkv(window=8)+adakv+kivi(bits=4, residual=32)"
    cache = KVCache(model, policy, f"{smallest(model, policy)}B")
    drive(model, cache, 1, [100, 1, 1, 7, 30, 1], 140)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *[("llama", policy) for policy in POLICIES],
        *[(name, "snapkv(window=8)+pyramidkv+adakv") for name in ("gemma2", "gpt_oss", "phi", "gpt2", *HYBRID)],
    ],
)
def test_every_chunking_and_a_long_decode_end_inside_the_budget(name: str, policy: str) -> None:
    model = model_of(name)
    for batch, size, length in ((1, 150, 250), (1, 64, 170), (3, 7, 110), (1, 1, 60)):
        budget = f"{smallest(model, policy, batch) * 9 // 8}B"
        drive(model, KVCache(model, policy, budget), batch, chain(repeat(size, -(-150 // size)), repeat(1)), length)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_smallest_budget_that_is_named_is_the_smallest(policy: str) -> None:
    model = model_of("llama")
    least = smallest(model, policy)
    cache = KVCache(model, policy, f"{least}B")
    feed(model, cache, random_text(60), None, 0, 60)
    assert resident_bytes(cache, model_tensors(model)) <= least
    with pytest.raises(BudgetError) as error:
        KVCache(model, policy, f"{least - 1}B")
    assert named_bytes(error) == least
    least = smallest(model, policy, 3)
    ids, mask = text(3, 60)
    with pytest.raises(BudgetError) as error:
        feed(model, KVCache(model, policy, f"{least - 1}B"), ids, mask, 0, 60)
    assert named_bytes(error) == least


def test_an_impossible_budget_is_refused_before_the_model_runs() -> None:
    model = model_of("llama")
    with pytest.raises(BudgetError, match=r"4KiB.*32 recent tokens.*snapkv.*at least \d+B.*lower window="):
        KVCache(model, "snapkv", "4KiB")
    with pytest.raises(BudgetError, match=r"32 tokens.*at least 33 tokens"):
        KVCache(model, "snapkv", 32)
    with pytest.raises(BudgetError, match=r"4 sinks \+ 20 marked tokens.*at least 25 tokens"):
        KVCache(model, "streaming_llm", 24, protect=[(10, 30)])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", ["full", "kivi(bits=4, residual=32)"])
def test_a_policy_that_keeps_everything_refuses_what_does_not_fit(policy: str, batch: int) -> None:
    model, foreign = model_of("llama"), model_tensors(model_of("llama"))
    ids, mask = text(batch, 600)
    with pytest.raises(BudgetError, match="keeps every entry") as error:
        feed(model, KVCache(model, policy, "64KiB"), random_text(600), None, 0, 600)
    enough_for_one = named_bytes(error)
    cache = KVCache(model, policy, f"{enough_for_one - (16 if batch == 1 else 0)}B")
    with pytest.raises(BudgetError, match="keeps every entry") as error:
        feed(model, cache, ids, mask, 0, 600)
    assert cache.nbytes == 0 and not cache.seen
    cache = KVCache(model, policy, f"{named_bytes(error)}B")
    feed(model, cache, ids, mask, 0, 600)
    assert resident_bytes(cache, foreign) <= cache.budget.amount
    longer = None if mask is None else torch.ones(batch, 700, dtype=torch.long)
    with pytest.raises(BudgetError, match="keeps every entry"):
        for step in range(600, 664):
            extra = (
                {}
                if longer is None or mask is None
                else {"attention_mask": torch.cat([mask, longer], 1)[:, : step + 1]}
            )
            with torch.no_grad():
                model(ids[:, :1], past_key_values=cache, **extra)
    assert resident_bytes(cache, foreign) <= cache.budget.amount
    cache.check_integrity()


@pytest.mark.parametrize("kind", [kind for kind in methods().values() if kind.prefill_peak == "full_prompt"])
def test_methods_that_must_hold_the_prompt_are_refused_under_bytes(kind: type[Recipe]) -> None:
    with pytest.raises(PolicyError, match=f"{kind.name}.*whole prompt.*1MiB"):
        KVCache(model_of("llama"), policy_text(kind), "1MiB")


def kept(cache: KVCache) -> Tensor:
    """Entries ``[layers, B, Hkv]``."""
    return torch.tensor([store.kept() for store in cache.enforcer.layers])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "policy", ["snapkv(window=8)", "streaming_llm", "knorm", "snapkv(window=8)+adakv", "pyramidkv"]
)
def test_tokens_and_fractions_bound_the_entries(policy: str, batch: int) -> None:
    model = model_of("llama")
    ids, mask = text(batch, 150)
    for budget, mean in ((40, [40] * 3), ("25%", None)):
        cache = KVCache(model, policy, budget)
        for begin, end in chunks(chain([64, 30], repeat(1, 10), [7, 9]), 120):
            feed(model, cache, ids, mask, begin, end)
            floor = cache.enforcer.floor
            each = mean or [max(floor, seen // 4) for seen in cache.seen]
            held = kept(cache)
            for b, seen in enumerate(cache.seen):
                assert int(held[:, b].sum()) <= max(each[b], floor) * held[:, b].numel()
                assert (held[:, b] <= seen).all()
                if policy in ("snapkv(window=8)", "streaming_llm", "knorm"):
                    assert (held[:, b] <= each[b]).all(), "without an allocator every head has the same share"
                elif policy != "pyramidkv":
                    assert (held[:, b].sum(-1) <= each[b] * held.shape[-1]).all(), "heads share what a layer has"


def test_a_fraction_of_a_declared_length_does_not_grow_with_the_text() -> None:
    model, ids = model_of("llama"), random_text(200)
    cache = KVCache(model, "knorm", "20%", max_length=100)
    for begin, end in chunks(repeat(50), 200):
        feed(model, cache, ids, None, begin, end)
        assert kept(cache).unique().tolist() == [20]


@pytest.mark.parametrize(
    "policy", ["streaming_llm", "knorm", "snapkv(window=8)+adakv", "streaming_llm+kivi(residual=32)"]
)
def test_protected_spans_stay_and_count(policy: str) -> None:
    model, spans = model_of("llama"), [(20, 30), (55, 58)]
    free = smallest(model, policy)
    with pytest.raises(BudgetError, match="13 marked tokens") as error:
        KVCache(model, policy, f"{free}B", protect=spans)
    cache = KVCache(model, policy, f"{named_bytes(error)}B", protect=spans)
    drive(model, cache, 1, chain([64, 1, 1], repeat(7)), 150)
    marked = torch.tensor([p for start, end in spans for p in range(start, end)])
    for store in cache.enforcer.layers:
        for segment_rows in zip(*(segment.positions() for segment in store.main), strict=True):
            assert torch.isin(marked, torch.cat(segment_rows)).all()


@pytest.mark.parametrize("protect", [[(5, 5)], [(-1, 3)], [(9, 4)]])
def test_a_span_without_tokens_is_refused(protect: list[tuple[int, int]]) -> None:
    with pytest.raises(PolicyError, match="is not a range of positions"):
        KVCache(model_of("llama"), "knorm", 100, protect=protect)


def decode(model: PreTrainedModel, cache: KVCache, prompt: int, steps: int) -> list[int]:
    """Entries of the first layer's first head after the prompt and after every step."""
    ids = random_text(prompt + steps)
    sizes = []
    for begin, end in chunks(chain([prompt], repeat(1)), prompt + steps):
        feed(model, cache, ids, None, begin, end)
        sizes.append(int(kept(cache)[0, 0, 0]))
    return sizes


def test_when_over_budget_evicts_ahead_and_fills_up_again() -> None:
    model = model_of("llama")
    sizes = decode(model, KVCache(model, "knorm", 128), 200, 50)
    grown = [after - before for before, after in pairwise(sizes)]
    # The first token finds no room; from then on entries leave when the rows are full, for sixteen more.
    assert sizes[:2] == [128, 112] and min(sizes) == 112
    assert grown[1:17] == [1] * 15 + [-15] and set(grown[1:]) == {1, -15}


@pytest.mark.parametrize(
    ("when", "least"), [("chunk", 128), ("every(1)", 128), ("every(4)", 124), ("every(1000)", 112)]
)
def test_when_bounds_how_far_ahead_evictions_go(when: str, least: int) -> None:
    model = model_of("llama")
    sizes = decode(model, KVCache(model, "knorm", 128, when=when), 200, 40)
    assert (max(sizes), min(sizes)) == (128, least)


def test_a_share_that_widens_counts_by_whole_stretches() -> None:
    """Rows are laid out anew only where a share has gained a whole stretch of entries, and are never above the share."""
    model = model_of("llama")
    cache = KVCache(model, "knorm", "80%")
    ids = random_text(200 + 120)
    feed(model, cache, ids, None, 0, 200)
    layouts, sizes = set(), []
    for end in range(201, 321):
        feed(model, cache, ids, None, end - 1, end)
        (segment,) = cache.enforcer.layers[0].main
        assert max(segment.lengths) <= int(0.8 * end) and max(segment.meta.capacities) <= int(0.8 * end)
        layouts.add(segment.meta.capacities[0])
        sizes.append(segment.lengths[0])
    assert layouts == {160, 176, 192, 208, 224, 240}
    assert all(n % 16 == 0 for a, n in pairwise(sizes) if n < a)


def states(model: PreTrainedModel, cache: KVCache, ids: Tensor, mask: Tensor | None, prompt: int) -> list[Tensor]:
    """After every step, how many entries each row of the layers holds, and how many of their values are coded."""
    found = []
    for begin, end in chunks(chain([prompt], repeat(1)), ids.shape[1]):
        feed(model, cache, ids, mask, begin, end)
        main = [segment for store in cache.enforcer.layers for segment in store.main]
        coded = [segment.value.coded for segment in main if segment.unit > 1]
        found.append(torch.tensor([segment.lengths for segment in main] + coded))
    return found


@pytest.mark.parametrize("policy", ["knorm", "h2o+kivi(bits=4, residual=64)"])
def test_stretches_of_a_padded_batch_are_those_of_its_rows(policy: str) -> None:
    """Sequences of other lengths evict and seal at other steps, each where it would alone."""
    model = model_of("llama")
    for budget in ("40%", 130):
        ids, mask = left_padded([random_text(n, seed=n) for n in (310, 203)])
        answer = random_text(70, seed=9)
        batch = torch.cat([ids, answer.expand(2, -1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 70)], dim=1)
        together = states(model, KVCache(model, policy, budget), batch, mask, 310)
        for b, n in enumerate((310, 203)):
            row = torch.cat([random_text(n, seed=n), answer], dim=1)
            alone = states(model, KVCache(model, policy, budget), row, None, n)
            assert [step[:, 2 * b : 2 * b + 2].tolist() for step in together] == [step.tolist() for step in alone]


@pytest.mark.parametrize(
    ("every", "entries", "steps"),
    [
        (None, 7, 1),
        (None, 40, 5),
        (None, 128, 16),
        (None, 1087, 16),
        (None, 1088, 17),
        (None, 8192, 128),
        (1, 8192, 1),
        (4, 8192, 4),
    ],
)
def test_an_eviction_makes_room_for_a_stretch_of_steps(every: int | None, entries: int, steps: int) -> None:
    assert Trigger(every=every).stretch(entries) == steps


def test_when_after_prefill_compresses_once_and_then_only_grows() -> None:
    model = model_of("llama")
    cache = KVCache(model, "knorm", 128, when="after_prefill")
    assert decode(model, cache, 200, 30) == list(range(128, 159))
    assert cache.enforcer.evictions == len(cache.enforcer.layers)
    with pytest.raises(BudgetError, match=r"after_prefill.*1MiB cannot hold"):
        KVCache(model, "knorm", "1MiB", when="after_prefill")


@pytest.mark.parametrize("when", ["never", "every(0)", "every(x)", "every(2", ""])
def test_unknown_triggers_are_refused(when: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(f"when={when!r}")):
        KVCache(model_of("llama"), "knorm", 100, when=when)


@pytest.mark.parametrize("policy", ["snapkv(window=8)+adakv", "streaming_llm+kivi(bits=4, residual=32)"])
def test_forks_stay_inside_the_budget_each(policy: str) -> None:
    model = model_of("llama")
    budget = smallest(model, policy) * 2
    parent = KVCache(model, policy, f"{budget}B")
    foreign = model_tensors(model)
    ids = random_text(200)
    feed(model, parent, ids, None, 0, 120)
    forks = [parent.fork() for _ in range(2)]
    together = resident_bytes([parent, *forks], foreign)
    assert together == resident_bytes(parent, foreign), "forks that have changed nothing cost nothing"
    for begin, end in chunks([1, 1, 7, 1, 1, 20, 1, 1], 80):
        for cache in (parent, *forks):
            feed(model, cache, ids[:, 120:], None, begin, end)
            assert resident_bytes(cache, foreign) <= budget
            cache.check_integrity()
    assert [cache.seen for cache in forks] == [parent.seen] * 2


def test_beams_come_back_into_the_budget_with_the_next_forward() -> None:
    model, policy = model_of("llama"), "snapkv(window=8)"
    cache = KVCache(model, policy, f"{smallest(model, policy, 3) * 2}B")
    feed(model, cache, random_text(100), None, 0, 100)
    cache.batch_repeat_interleave(3)
    ids = random_text(1, rows=3)
    for beams in ([0, 1, 2], [2, 2, 0], [1, 0, 1]):
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert resident_bytes(cache, model_tensors(model)) <= cache.budget.amount
        cache.check_integrity()
        cache.reorder_cache(torch.tensor(beams))


def test_prefill_in_chunks_stays_inside_at_every_progress_report() -> None:
    model, policy = model_of("llama"), "snapkv(window=8)+adakv"
    cache = KVCache(model, policy, f"{2 * smallest(model, policy)}B")
    seen: list[int] = []

    def watch(done: int, total: int) -> None:
        assert resident_bytes(cache, model_tensors(model)) <= cache.budget.amount
        seen.append(done)

    cache.prefill(model, random_text(800), progress=watch)
    assert seen == [0, 400, 800], "a byte budget takes the prompt in chunks of at most 512"


@pytest.mark.parametrize("policy", ["snapkv(window=8)+kivi(residual=32)", "tova+kivi(bits=2, residual=64)"])
def test_scattered_spans_hold_the_coded_units_that_they_touch(policy: str) -> None:
    """A unit that is coded with one marked entry stays whole, and the smallest budget that is accepted knows that."""
    spans = [(start, start + 3) for start in range(5, 380, 15)]
    model, ids = model_of("llama"), random_text(400)
    floor = KVCache(model, policy, 4000, protect=spans).enforcer.floor
    with pytest.raises(BudgetError, match=f"at least {floor} tokens"):
        KVCache(model, policy, floor - 1, protect=spans)
    cache = KVCache(model, policy, floor, protect=spans)
    for begin, end in chunks(repeat(50), 400):
        feed(model, cache, ids, None, begin, end)
        assert int(kept(cache).max()) <= floor


def test_overlapping_spans_count_once() -> None:
    overlapping, joined = ([(9, 30), (2, 12), (30, 33), (4, 5)], [(2, 33)])
    caches = [KVCache(model_of("llama"), "knorm", 100, protect=spans) for spans in (overlapping, joined)]
    assert caches[0].enforcer.spans == caches[1].enforcer.spans == joined


@pytest.mark.parametrize(
    "policy", ["snapkv(window=8)", "h2o", "snapkv(window=8)+adakv+kivi(bits=4, residual=32)", "mikv", "d2o"]
)
def test_sequences_that_are_repeated_share_the_bytes(policy: str) -> None:
    model, ids = model_of("llama"), random_text(200)
    least = KVCache(model, policy, "1GiB").enforcer.smallest_bytes(4)
    cache = KVCache(model, policy, f"{least}B")
    feed(model, cache, ids, None, 0, 180)
    held, kept_before = cache.nbytes, kept(cache).tolist()
    with pytest.raises(BudgetError, match="for 5 sequences"):
        cache.batch_repeat_interleave(5)
    assert kept(cache).tolist() == kept_before and cache.seen == [180] and cache.nbytes == held
    cache.batch_repeat_interleave(4)
    cache.check_integrity()
    assert cache.nbytes <= least and cache.seen == [180] * 4
    feed(model, cache, ids.repeat(4, 1), None, 180, 190)
    cache.check_integrity()


def test_what_keeps_everything_is_repeated_only_where_it_fits() -> None:
    model, ids = model_of("llama"), random_text(100)
    alone = KVCache(model, "full")
    model(ids, past_key_values=alone)
    cache = KVCache(model, "full", f"{3 * alone.nbytes}B")
    model(ids, past_key_values=cache)
    with pytest.raises(BudgetError, match="100 tokens of 6 sequences do not fit"):
        cache.batch_repeat_interleave(6)
    cache.batch_repeat_interleave(2)
    assert cache.seen == [100, 100] and cache.nbytes <= 3 * alone.nbytes
