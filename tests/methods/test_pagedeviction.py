"""PagedEviction against brute force, and the checks of its card."""

from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, chunks, distinct_text, kept_positions, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import BudgetError, PolicyError
from tiny import tiny_model

PAGE = 16


class Pages:
    """Keeps, per layer, which stored entries form a page; entries of the running forward are not in one yet."""

    def __init__(self) -> None:
        self.paged: dict[int, int] = {}

    def __call__(self, step: Step, limit: int) -> Sequence[Tensor]:
        positions = step.heads[0].positions
        layer, held = id(step.heads), len(positions)
        ratios = [head.values.norm(dim=-1) / head.keys.norm(dim=-1) for head in step.heads]
        scores = torch.stack(ratios).mean(0)
        paged = self.paged.get(layer, 0)
        units = [list(range(begin, begin + PAGE)) for begin in range(0, paged, PAGE)]
        units += [[index] for index in range(paged, held)]

        def safe(unit: list[int]) -> bool:
            return any(positions[i] < PAGE or positions[i] >= step.seen - PAGE for i in unit)

        for unit in sorted((u for u in units if not safe(u)), key=lambda u: scores[u].mean().item()):
            if held <= limit:
                break
            held -= len(unit)
            units.remove(unit)
        self.paged[layer] = held // PAGE * PAGE
        kept = torch.tensor(sorted(index for unit in units for index in unit))
        return [kept] * len(step.heads)


def model_of(heads=(4, 2)):
    return tiny_model("llama", vocab_size=1024, num_attention_heads=heads[0], num_key_value_heads=heads[1])


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((4, 2), [150] + [1] * 40), ((3, 1), chunks(150, 64) + [1] * 40), ((4, 4), [7] * 20 + [1] * 20)],
    ids=["one pass", "chunks of 64", "chunks of 7, MHA"],
)
def test_tokens_then_pages(heads, sizes):
    model = model_of(heads)
    cache = KVCache(model, "pagedeviction", 70)
    run(model, cache, distinct_text(sum(sizes)), sizes, Brute(Pages(), 70))


def test_one_whole_page_leaves_every_sixteen_steps():
    model, ids = model_of(), distinct_text(240)
    cache = KVCache(model, "paged_eviction", 64)
    run(model, cache, ids[:, :140], [140])
    assert cache.report().kept == [[[64, 64]]] * 2
    pages = [frozenset(kept_positions(cache, 1)[0][i : i + PAGE]) for i in range(0, 64, PAGE)]
    left = []
    for step in range(140, 240):
        before = kept_positions(cache, 1)[0]
        run(model, cache, ids[:, step : step + 1], [1])
        rows = kept_positions(cache, 1)
        assert rows[0] == rows[1] and len(rows[0]) <= 64
        gone = frozenset(before) - frozenset(rows[0])
        if gone:
            left.append(step)
            # No entry moves between pages: what leaves is a page as it was filled, neither the first nor the newest.
            assert gone in pages[1:-1]
            pages.remove(gone)
        if len(rows[0]) % PAGE == 0:
            pages.append(frozenset(rows[0][-PAGE:]))
    assert left == list(range(140, 240, 16))


def test_first_page_and_newest_entries_stay():
    model = model_of()
    cache = KVCache(model, "pagedeviction", 80)
    run(model, cache, distinct_text(250), [200] + [1] * 50)
    for row in kept_positions(cache, 0):
        assert row[:PAGE] == list(range(PAGE)) and row[-PAGE:] == list(range(250 - PAGE, 250))


def test_three_pages_are_the_least():
    model = model_of()
    with pytest.raises(BudgetError, match="48 tokens"):
        KVCache(model, "pagedeviction", 47)
    cache = KVCache(model, "pagedeviction", 48)
    run(model, cache, distinct_text(200), chunks(100, 30) + [1] * 100)
    assert max(cache.report().kept[0][0]) <= 48


def test_an_allocator_over_heads_and_empty_pages_are_refused():
    with pytest.raises(PolicyError, match="same entries in all heads"):
        KVCache(model_of(), "adakv+pagedeviction", 64)
    with pytest.raises(PolicyError, match="page=0"):
        KVCache(model_of(), "pagedeviction(page=0)", 64)
