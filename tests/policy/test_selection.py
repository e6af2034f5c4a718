"""Selection against sorting in plain Python: protection, exact counts, ties, units."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbudget.policy.base import Protect
from kvbudget.policy.selection import newest, protected_entries, select

cells = st.integers(0, 10_000)


def grid(seed: int, *, ties: bool = False):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, 24, generator=generator)
    if ties:
        scores = (scores * 4).floor()
    lengths = torch.randint(1, 25, (2, 3), generator=generator)
    valid = torch.arange(24) < lengths[..., None]
    protected = torch.rand(2, 3, 24, generator=generator) < 0.2
    counts = (torch.rand(2, 3, generator=generator) * (lengths + 1)).long()
    return scores, protected, valid, counts


@given(seed=cells, ties=st.booleans())
def test_the_best_stay_and_protected_ones_first(seed, ties):
    scores, protected, valid, counts = grid(seed, ties=ties)
    keep = select(scores, protected, valid, counts)
    for b in range(2):
        for h in range(3):
            held = [t for t in range(24) if valid[b, h, t]]
            fixed = [t for t in held if protected[b, h, t]]
            others = sorted((t for t in held if t not in fixed), key=lambda t: (-scores[b, h, t].item(), t))
            expected = sorted(fixed + others[: max(0, int(counts[b, h]) - len(fixed))])
            assert keep[b, h].nonzero().flatten().tolist() == expected


@given(seed=cells)
def test_units_stay_or_go_together(seed):
    scores, protected, valid, counts = grid(seed)
    counts = counts.clamp_min(1)
    units = torch.arange(24).expand(2, 3, -1) // 4 * 4
    keep = select(scores, protected, valid, counts, units)
    for b in range(2):
        for h in range(3):
            pages = {}
            for t in range(24):
                if valid[b, h, t]:
                    pages.setdefault(t // 4, []).append(t)
            safe = [page for page in pages.values() if any(protected[b, h, t] for t in page)]
            limit = max(int(counts[b, h]), sum(map(len, safe)))
            rest = sorted((p for p in pages.values() if p not in safe), key=lambda p: -scores[b, h, p].mean().item())
            expected, room = [t for page in safe for t in page], limit - sum(map(len, safe))
            for page in rest:
                # A unit that does not fit ends the list: a worse one never stays in place of a better one.
                if len(page) > room:
                    break
                expected += page
                room -= len(page)
            assert keep[b, h].nonzero().flatten().tolist() == sorted(expected)


def test_protection_by_position():
    positions = torch.tensor([[[0, 1, 5, 6, 7, 20, 21, -1]]])
    found = protected_entries(positions, [22], Protect(sinks=2, recent=3), [(6, 8)])
    assert found[0, 0].tolist() == [True, True, False, True, True, True, True, False]
    assert not protected_entries(positions, [22], Protect(), []).any()


def test_newest_counts_entries_and_not_positions():
    positions = torch.tensor([[[0, 5, 9], [2, 3, -1]]])
    assert newest(positions, torch.tensor([[2, 1]]))[0].tolist() == [[False, True, True], [False, True, False]]
