"""QuantizedSegment against lists of entries: tails of their own lengths, codes that stay, units that go whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.segments.base import AttendContext
from kvbudget.segments.quantized import QuantizedSegment
from min_max import per_channel, per_token

WIDTH, VALUE_WIDTH = 16, 24


@dataclass
class Entry:
    position: int
    key: Tensor
    value: Tensor
    key_coded: bool = False
    value_coded: bool = False


@dataclass
class Plain:
    """One row as KIVI's algorithm 1 describes it; where entries have left, values await no lump to be coded next."""

    key_bits: int
    value_bits: int
    unit: int
    residual: int
    entries: list[Entry]
    thinned: bool = False
    started: bool = False

    def seal(self) -> None:
        tail = [entry for entry in self.entries if not entry.key_coded]
        due = tail[: len(tail) // self.residual * self.residual]
        if due:
            coded = per_channel(torch.stack([entry.key for entry in due]), self.key_bits, self.unit)
            for entry, key in zip(due, coded, strict=True):
                entry.key, entry.key_coded = key.float(), True
        waiting = [entry for entry in self.entries if not entry.value_coded]
        lump = 1 if self.thinned and self.started else max(1, min(16, self.residual // 8))
        for entry in waiting[: max(0, len(waiting) - self.residual) // lump * lump]:
            entry.value, self.started = per_token(entry.value, self.value_bits, 8).float(), True
            entry.value_coded = True
        self.thinned = False

    def copy(self) -> Plain:
        return replace(self, entries=[replace(entry) for entry in self.entries])


class Pair:
    """A segment beside its rows as plain lists."""

    def __init__(self, rows: int, key_bits: int = 4, value_bits: int = 2, unit: int = 4, residual: int = 8) -> None:
        key = ChannelQuant(bits=key_bits, unit=unit, residual=residual)
        value = TokenQuant(bits=value_bits, group=8, residual=residual)
        self.segment = QuantizedSegment(rows, key, value)
        self.rows = [Plain(key_bits, value_bits, unit, residual, []) for _ in range(rows)]
        self.next = [0] * rows

    def append(self, counts: list[int]) -> None:
        key, value = torch.randn(sum(counts), WIDTH), torch.randn(sum(counts), VALUE_WIDTH)
        position = torch.cat([torch.arange(n, n + count) for n, count in zip(self.next, counts, strict=True)])
        self.segment.append(key, value, {"position": position.int()}, counts)
        fresh = iter(zip(position.tolist(), key, value, strict=True))
        for row, count in zip(self.rows, counts, strict=True):
            row.entries += [Entry(*next(fresh)) for _ in range(count)]
        self.next = [n + count for n, count in zip(self.next, counts, strict=True)]

    def seal(self) -> None:
        self.segment.seal()
        for row in self.rows:
            row.seal()

    def take(self, kept: list[list[bool]], spare: int = 0) -> None:
        mask = torch.zeros(len(kept), self.segment.longest, dtype=torch.bool)
        for r, flags in enumerate(kept):
            mask[r, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
        self.segment.take(mask, spare)
        for row, flags in zip(self.rows, kept, strict=True):
            row.thinned = row.thinned or not all(flags)
            row.entries = [entry for entry, keep in zip(row.entries, flags, strict=True) if keep]

    def check(self) -> None:
        self.segment.check_integrity()
        assert self.segment.lengths == [len(row.entries) for row in self.rows]
        assert self.segment.sealed == [sum(entry.key_coded for entry in row.entries) for row in self.rows]
        assert self.segment.value.coded == [sum(entry.value_coded for entry in row.entries) for row in self.rows]
        for r, row in enumerate(self.rows):
            held = len(row.entries)
            if not held:
                continue
            assert self.segment.meta.row("position", r).tolist() == [entry.position for entry in row.entries]
            for mine, theirs in ((self.segment.keys(), "key"), (self.segment.values(), "value")):
                expected = torch.stack([getattr(entry, theirs) for entry in row.entries])
                torch.testing.assert_close(mine[r, :held], expected, atol=1e-5, rtol=0)
        if self.segment.longest:
            self.check_attention()

    def check_attention(self) -> None:
        query = torch.randn(len(self.rows), 3, WIDTH)
        ctx = AttendContext(scale=0.3, softcap=4.0)
        part = self.segment.attend(query, ctx)
        masses = self.segment.mass(query, part.lse.masked_fill(part.lse.isinf(), math.inf), ctx)
        for r, row in enumerate(self.rows):
            if not row.entries:
                assert bool((part.lse[r] == -math.inf).all() and (part.out[r] == 0).all())
                continue
            key = torch.stack([entry.key for entry in row.entries]).double()
            value = torch.stack([entry.value for entry in row.entries]).double()
            logits = 4.0 * torch.tanh(query[r].double() @ key.T * 0.3 / 4.0)
            weights = torch.softmax(logits, dim=-1)
            torch.testing.assert_close(part.out[r].double(), weights @ value, atol=2e-5, rtol=0)
            torch.testing.assert_close(part.lse[r].double(), logits.logsumexp(-1), atol=2e-5, rtol=0)
            torch.testing.assert_close(masses[r].double(), weights.sum(0), atol=2e-5, rtol=0)


def fresh_pair(data: st.DataObject) -> Pair:
    bits = st.sampled_from((1, 2, 3, 4, 8))
    unit = data.draw(st.sampled_from((2, 4)), label="unit")
    residual = unit * data.draw(st.sampled_from((1, 2, 3, 10)), label="units in the residual")
    return Pair(data.draw(st.integers(1, 3), label="rows"), data.draw(bits), data.draw(bits), unit, residual)


def kept_flags(data: st.DataObject, row: Plain) -> list[bool]:
    """Sealed units stay or go whole, other entries one by one."""
    sealed = sum(entry.key_coded for entry in row.entries)
    flags = [flag for _ in range(sealed // row.unit) for flag in [data.draw(st.booleans())] * row.unit]
    return flags + [data.draw(st.booleans()) for _ in range(len(row.entries) - sealed)]


@given(st.data())
def test_any_sequence_of_operations_is_that_of_lists(data):
    pair = fresh_pair(data)
    rows = len(pair.rows)
    for _ in range(data.draw(st.integers(1, 6), label="operations")):
        operation = data.draw(st.sampled_from(("append", "append", "take", "truncate", "rows")))
        if operation == "append":
            most = 20 if pair.rows[0].residual < 20 else 60
            pair.append(data.draw(st.lists(st.integers(0, most), min_size=rows, max_size=rows)))
            if data.draw(st.booleans(), label="seal"):
                pair.seal()
        elif operation == "take":
            pair.take([kept_flags(data, row) for row in pair.rows], data.draw(st.integers(0, 3)))
        elif operation == "rows":
            index = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
            pair.segment.select_rows(index)
            pair.rows, pair.next = [pair.rows[i].copy() for i in index], [pair.next[i] for i in index]
        else:
            cut = data.draw(st.integers(0, 5))
            lengths = [max(0, len(row.entries) - cut) for row in pair.rows]
            coded = [sum(e.key_coded or e.value_coded for e in row.entries) for row in pair.rows]
            assert pair.segment.can_truncate(lengths) == all(n >= c for n, c in zip(lengths, coded, strict=True))
            if pair.segment.can_truncate(lengths):
                pair.segment.truncate(lengths)
                for row, n in zip(pair.rows, lengths, strict=True):
                    del row.entries[n:]
        pair.check()


@pytest.mark.parametrize("residual", [8, 16])
@pytest.mark.parametrize("step", [1, 3, 40])
def test_key_tails_cycle_and_value_tails_stay(step, residual):
    pair = Pair(2, unit=8, residual=residual)
    for total in range(step, 121, step):
        pair.append([step, step])
        pair.seal()
        assert pair.segment.key.tail.lengths == [total % residual] * 2
        lump = residual // 8
        assert pair.segment.value.tail.lengths == [min(total, residual + (total - residual) % lump)] * 2
    pair.check()


def test_rows_that_lost_other_entries_are_sealed_together():
    """Rows whose tails differ would come to their lumps one by one; an eviction lets all of them seal what is due."""
    pair = Pair(3, unit=8, residual=64)
    pair.append([100] * 3)
    pair.seal()
    pair.append([3] * 3)
    flags = [[True] * 103 for _ in range(3)]
    for row, gone in zip(flags, (1, 2, 5), strict=True):
        row[-gone:] = [False] * gone
    pair.take(flags, spare=40)
    pair.seal()
    pair.check()
    assert pair.segment.value.tail.lengths == [64] * 3
    addresses = [column.data_ptr() for table in pair.segment.tables() for column in table.columns.values()]
    for _ in range(8):  # until all have a lump again, at once; nothing moves meanwhile
        assert pair.segment.value.due() == [0] * 3
        pair.append([1] * 3)
        pair.seal()
    assert pair.segment.value.tail.lengths == [64] * 3
    assert addresses == [column.data_ptr() for table in pair.segment.tables() for column in table.columns.values()]
    pair.check()


def test_codes_are_never_coded_again():
    pair = Pair(2)
    pair.append([30, 30])
    pair.seal()
    before = {side: dict(getattr(pair.segment, side).sealed.columns) for side in ("key", "value")}
    units = {side: list(getattr(pair.segment, side).sealed.lengths) for side in ("key", "value")}
    before = {side: {name: column.clone() for name, column in columns.items()} for side, columns in before.items()}
    for _ in range(50):
        pair.append([1, 1])
        pair.seal()
    for side, columns in before.items():
        table = getattr(pair.segment, side).sealed
        for name, column in columns.items():
            old = column.view(2, -1, *column.shape[1:])
            for r in range(2):
                assert torch.equal(table.row(name, r)[: units[side][r]], old[r, : units[side][r]])


def test_a_sealed_unit_cannot_be_split():
    pair = Pair(1)
    pair.append([16])
    pair.seal()
    keep = torch.ones(1, 16, dtype=torch.bool)
    keep[0, 3] = False
    with pytest.raises(AssertionError, match="whole"):
        pair.segment.take(keep)


def test_a_fork_does_not_see_what_the_other_does():
    pair = Pair(2)
    pair.append([21, 13])
    pair.seal()
    twin = Pair(2)
    twin.segment, twin.rows, twin.next = pair.segment.share(), [row.copy() for row in pair.rows], list(pair.next)
    addresses = [
        {t.untyped_storage().data_ptr() for t in segment.tensors()} for segment in (pair.segment, twin.segment)
    ]
    assert addresses[0] == addresses[1]
    for one in (pair, twin):
        for _ in range(12):
            one.append([1, 2])
            one.seal()
    key, value = pair.segment.writable(0)
    key += 1.0
    value -= 1.0
    for entry, k, v in zip(reversed(pair.rows[0].entries), reversed(key), reversed(value), strict=False):
        entry.key, entry.value = k.clone(), v.clone()
    pair.check()
    twin.check()


def test_writable_entries_are_those_in_full_precision_on_both_sides():
    pair = Pair(1, unit=4, residual=8)
    pair.append([21])
    pair.seal()
    key, value = pair.segment.writable(0)  # 16 keys are coded and 13 values
    assert len(key) == len(value) == 5
    plain = pair.rows[0].entries[-5:]
    assert torch.equal(key, torch.stack([e.key for e in plain])) and torch.equal(
        value, torch.stack([e.value for e in plain])
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_balance_leaves_logits_and_is_moved_with_its_row(rows):
    codec = TokenQuant(bits=2, group=8, residual=1000)
    balance = torch.rand(rows, WIDTH) * 5 + 0.05
    plain, balanced = QuantizedSegment(rows, codec, codec), QuantizedSegment(rows, codec, codec, balance)
    counts = [7 + r for r in range(rows)]
    key, value = torch.randn(sum(counts), WIDTH), torch.randn(sum(counts), VALUE_WIDTH)
    position = torch.cat([torch.arange(n) for n in counts]).int()
    for segment in (plain, balanced):
        segment.append(key, value, {"position": position}, counts)
        segment.seal()
        segment.select_rows(list(reversed(range(rows))))
        segment.check_integrity()
    query = torch.randn(rows, 4, WIDTH)
    ctx = AttendContext(scale=1.0)
    one, other = plain.attend(query, ctx), balanced.attend(query, ctx)
    torch.testing.assert_close(one.lse, other.lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(one.out, other.out, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(plain.keys(), balanced.keys(), atol=1e-5, rtol=1e-5)
    assert sum(balanced.parts().values()) == sum(plain.parts().values()) + balance.untyped_storage().nbytes()


def test_parts_are_the_resident_bytes():
    pair = Pair(2)
    pair.append([40, 3])
    pair.seal()
    assert sum(pair.segment.parts().values()) == sum(t.untyped_storage().nbytes() for t in pair.segment.tensors())
