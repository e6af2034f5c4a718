"""Selection keeps exact counts, the best first, protected ones always and units whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbudget.policy.base import Protect
from kvbudget.policy.selection import newest, protected_entries, select


def brute(scores: list[float], protected: list[bool], valid: list[bool], count: int) -> list[bool]:
    cells = [t for t in range(len(scores)) if valid[t]]
    cells.sort(key=lambda t: (not protected[t], -scores[t], t))
    fixed = sum(protected[t] for t in cells)
    kept = set(cells[: max(count, fixed)])
    return [t in kept for t in range(len(scores))]


rows = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-3, 3).map(float) | st.just(float("-inf")), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.integers(0, n),
        st.integers(0, n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n).map(sorted),
    )
)


@given(rows)
def test_the_best_stay_and_protected_ones_always(row: tuple) -> None:
    scores, protected, length, count, _ = row
    valid = [t < length for t in range(len(scores))]
    shape = (1, 1, len(scores))
    keep = select(
        torch.tensor(scores).view(shape), torch.tensor(protected).view(shape), torch.tensor(valid).view(shape),
        torch.tensor([[count]]),
    )  # fmt: skip
    assert keep.flatten().tolist() == brute(scores, protected, valid, count)


@given(rows)
def test_units_stay_or_go_whole(row: tuple) -> None:
    scores, protected, length, count, units = row
    scores = [max(score, -9.0) for score in scores]
    shape = (1, 1, len(scores))
    valid = torch.arange(len(scores)).view(shape) < length
    fixed = torch.tensor(protected).view(shape)
    ids = torch.tensor(units).view(shape)
    keep = select(torch.tensor(scores).view(shape), fixed, valid, torch.tensor([[count]]), ids)
    assert not (keep & ~valid).any() and (keep | ~(fixed & valid)).all()
    whole = {u: keep[(ids == u) & valid] for u in set(units)}
    assert all(cells.all() or not cells.any() for cells in whole.values())
    must = sum(len(cells) for u, cells in whole.items() if (fixed & valid)[ids == u].any())
    assert int(keep.sum()) <= max(count, must)
    largest = max((len(cells) for cells in whole.values()), default=0)
    assert int(keep.sum()) > min(max(count, must), length) - max(largest, 1), (
        "a unit that would have fitted was dropped"
    )


def test_protection_is_by_position() -> None:
    positions = torch.tensor([[[0, 3, 7, 8, 9], [1, 2, 5, 9, -1]]])
    mask = protected_entries(positions, [10], Protect(sinks=2, recent=2), [(3, 6)])
    assert mask.tolist() == [[[True, True, False, True, True], [True, False, True, True, False]]]


def test_the_newest_entries_are_those_of_the_highest_positions() -> None:
    positions = torch.tensor([[[0, 3, 7, -1], [5, 6, 8, 9]]])
    assert newest(positions, torch.tensor([[2, 1]])).tolist() == [
        [[False, True, True, False], [False, False, False, True]]
    ]


def test_a_window_that_shrinks_leaves_room_for_sinks_and_marked_spans():
    protect = Protect(sinks=4, recent=8, most=0.5)
    assert [protect.window(mean) for mean in (5.0, 6.9, 12.0, 100.0)] == [1, 2, 6, 8]
    assert protect.window(20.0, marked=14) == 2 and Protect(recent=8).window(5.0) == 8
