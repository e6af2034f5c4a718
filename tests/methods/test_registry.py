"""Every method of the registry, on random models: exact where all fits, inside the budget everywhere, rows independent."""

from collections.abc import Sequence

import pytest
import torch
from brute import chunks, kept_positions
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.errors import BudgetError, KVBudgetError, PolicyError
from kvbudget.methods import parse, registry
from kvbudget.policy.policy import MOST, Policy, build
from residency import model_tensors, resident_bytes, resident_tensors
from tiny import left_padded, random_text, tiny_model

# Methods as they fit texts of some hundred tokens; the others are taken with their defaults.
SMALL = {
    "snapkv": "snapkv(window=16)",
    "cake": "cake(window=16)",
    "adakv": "snapkv(window=16)+adakv",
    "pyramidkv": "snapkv(window=16)+pyramidkv",
    "zigzagkv": "snapkv(window=16)+zigzagkv(window=16)",
    "kivi": "streaming_llm+kivi(residual=32)",
    "random": "random(recent=16)",
    "lagkv": "lagkv(lag=16)",
    "roco": "roco(every=1)",
    "corm": "corm(window=24, recent=8)",
    "fastgen": "fastgen(recovery=0.6, local=0.1)",
    "fair": "fair(cuts=(30,), window=32)",
    "full": "full",
    "transformer_vq": "transformer_vq(codes=8)",
    "lattice": "lattice(slots=8)",
    "mixattention": "streaming_llm+mixattention(every=1)",
    "cla": "streaming_llm+cla",
    "minicache": "streaming_llm+minicache",
    "kcache": "streaming_llm+kcache(top=16)",
    "neurocache": "streaming_llm+neurocache(top=4, window=16)",
    "scope": "snapkv(window=16)+scope(recent=16)",
    "morphkv": "morphkv(window=16)",
    "windowkv": "windowkv(window=16, group=2)",
    "task_kv": "task_kv(window=16, sinks=4, recent=16)",
}
ELSEWHERE = {"plan", "calibration", "driver"}
METHODS = [name for name, kind in registry().items() if not ELSEWHERE & set(kind.needs)]
EVICTING = [name for name in METHODS if parse(SMALL.get(name, name)).parts().scorer is not None]


def new_cache(model: PreTrainedModel, name: str, budget: object, **options: object) -> KVCache:
    return KVCache(model, SMALL.get(name, name), budget, **options)


def feed(
    model: PreTrainedModel, cache: KVCache, ids: Tensor, sizes: Sequence[int], mask: Tensor | None = None
) -> Tensor:
    """Forwards of these sizes, everything checked after each of them; logits of all columns."""
    known = [*model_tensors(model), *resident_tensors(cache.policy)]  # a calibration belongs to the model
    logits, begin = [], 0
    for size in sizes:
        end = begin + size
        options = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            options = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        with torch.inference_mode():
            logits.append(model(ids[:, begin:end], past_key_values=cache, **options).logits)
        begin = end
        check(cache, known)
    return torch.cat(logits, dim=1)


def check(cache: KVCache, known: Sequence[Tensor]) -> None:
    """Integrity, the budget by bytes and by counts, position order, and what the policy protects."""
    cache.check_integrity()
    cost, heads = cache.enforcer.cost, cache.enforcer.layers[0].num_kv_heads
    entries = [cache.enforcer.mean_entries(seen) for seen in cache.seen]
    # Demoted entries come on top of a budget in entries.
    rows = [
        cost.fixed + mean * cost.per_entry + seen * cost.aside for mean, seen in zip(entries, cache.seen, strict=True)
    ]
    limit = len(cache.layers) * heads * sum(rows)
    assert resident_bytes(cache, besides=known) <= min(
        limit, cache.budget.amount if cache.budget.kind == "bytes" else limit
    )
    protect = cache.parts.protect
    for b, seen in enumerate(cache.seen):
        if not seen:
            continue
        held = [sum(store.evictable()[b]) for store in cache.enforcer.layers]
        assert sum(held) <= entries[b] * heads * len(held)
        for layer, store in enumerate(cache.enforcer.layers):
            for row in kept_positions(cache, layer, b):
                assert row == sorted(set(row)) and all(position < seen for position in row)
                assert row[: protect.sinks] == list(range(min(protect.sinks, seen)))
                recent = min(protect.window(entries[b]), seen)
                assert row[len(row) - recent :] == list(range(seen - recent, seen)), store.layer_idx


@pytest.mark.parametrize("budget", ["1GiB", "100%"])
@pytest.mark.parametrize("name", METHODS)
def test_exact_where_everything_fits(name, budget):
    model, ids = tiny_model("llama"), random_text(110)
    with torch.inference_mode():
        expected = model(ids).logits
    size = {"1GiB": 100, "100%": 7}[budget]
    cache = new_cache(model, name, budget, max_length=110)
    logits = feed(model, cache, ids, chunks(100, size) + [1] * 10)
    if cache.policy.lossless_when_fits:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    if cache.parts.threshold is None:
        assert cache.report().kept_entries == cache.report().seen_entries and cache.enforcer.evictions == 0


@pytest.mark.parametrize(("budget", "prompt", "size"), [(64, 150, 150), ("36KiB", 150, 64), ("30%", 77, 7)])
@pytest.mark.parametrize("name", EVICTING)
def test_the_budget_holds_in_prefill_and_decode(name, budget, prompt, size):
    model = tiny_model("llama")
    cache = new_cache(model, name, budget, max_length=210)
    feed(model, cache, random_text(prompt + 40), chunks(prompt, size) + [1] * 40)
    in_place = sum(sum(map(sum, store.evictable())) for store in cache.enforcer.layers)
    assert cache.enforcer.evictions > 0 and in_place < cache.report().seen_entries


@pytest.mark.parametrize(("budget", "steps"), [(64, 12), ("150KiB", 2)])
@pytest.mark.parametrize("name", EVICTING)
def test_padded_rows_equal_their_single_runs(name, budget, steps):
    """Rows of different lengths, then a turn that brings them few, many and no new tokens, then decode steps."""
    model = tiny_model("llama")
    lengths, turns = (40, 150, 97), (3, 12, 0)
    texts = [random_text(length + turn + steps, seed=length) for length, turn in zip(lengths, turns, strict=True)]
    pieces = []
    for begins, counts in (
        ((0, 0, 0), lengths),
        (lengths, turns),
        ([a + b for a, b in zip(lengths, turns, strict=True)], [steps] * 3),
    ):
        rows = [text[:, begin : begin + n] for text, begin, n in zip(texts, begins, counts, strict=True)]
        pieces.append(left_padded(rows))
    ids, mask = (torch.cat(columns, dim=1) for columns in zip(*pieces, strict=True))
    # The second chunk begins inside the padding of one row and inside the text of another.
    batch = new_cache(model, name, budget)
    logits = feed(model, batch, ids, [70, 80, 12] + [1] * steps, mask)
    single_budget = budget if isinstance(budget, int) else "50KiB"
    for b, (text, length, turn) in enumerate(zip(texts, lengths, turns, strict=True)):
        first = max(0, 70 - (150 - length))
        single = new_cache(model, name, single_budget)
        expected = feed(model, single, text, [n for n in (first, length - first, turn) if n] + [1] * steps)
        for layer in range(len(batch.enforcer.layers)):
            assert kept_positions(batch, layer, b) == kept_positions(single, layer)
        torch.testing.assert_close(logits[b : b + 1, mask[b].bool()], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (8, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("name", EVICTING)
def test_all_head_groups(name, heads):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = new_cache(model, name, 64)
    logits = feed(model, cache, random_text(130), [120] + [1] * 10)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", EVICTING)
def test_tiny_budgets_are_kept_or_refused(name):
    model, ids = tiny_model("llama"), random_text(90)
    kept = []
    for budget in (1, 2, 5, 17, 48, "100B", "3KiB", "12KiB", "40KiB", "0.5%", "5%"):
        try:
            cache = new_cache(model, name, budget)
            feed(model, cache, ids, [60] + [1] * 3)
        except (BudgetError, PolicyError) as error:
            assert "give" in str(error), error
            continue
        kept.append(budget)
    assert "100B" not in kept and 48 in kept


@pytest.mark.parametrize("name", METHODS)
def test_the_largest_numbers_are_refused_in_one_line_or_work(name):
    """What is counted against a text may be larger than any text; nothing is made room for before it is needed."""
    model, ids = tiny_model("llama"), random_text(90)
    for key, default in registry()[name].parameters().items():
        if isinstance(default, (bool, str)):
            continue
        value = (MOST,) if isinstance(default, tuple) else MOST
        try:
            evicts = parse(SMALL.get(name, name)).parts().scorer is not None
            recipe = build(registry(), name, {key: value})
            cache = KVCache(model, Policy((*(() if evicts else parse("tova").recipes), recipe)), 64)
            with torch.inference_mode():
                for chunk in (*ids[:, :80].split(40, 1), *ids[:, 80:].split(1, 1)):
                    assert bool(model(chunk, past_key_values=cache).logits.isfinite().all())
            cache.check_integrity()
        except KVBudgetError as error:
            assert "\n" not in str(error), error


@pytest.mark.parametrize("name", [name for name in EVICTING if parse(SMALL.get(name, name)).prefix_reusable])
def test_questions_on_forks_of_one_context_are_answered_as_on_caches_of_their_own(name):
    model, context = tiny_model("llama"), random_text(90)
    base = new_cache(model, name, 48)
    feed(model, base, context, [90])
    forks = [base.fork() for _ in range(3)]
    for seed, fork in enumerate(forks):
        question, alone = random_text(6, seed=seed), new_cache(model, name, 48)
        expected = feed(model, alone, torch.cat([context, question], dim=1), [90, 4, 1, 1])[:, 90:]
        torch.testing.assert_close(feed(model, fork, question, [4, 1, 1]), expected, atol=1e-4, rtol=0)
        for layer in range(len(base.enforcer.layers)):
            assert kept_positions(fork, layer) == kept_positions(alone, layer)
    assert base.seen == [90]
