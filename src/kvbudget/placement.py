"""Placement: which device holds which KV heads when heads keep different numbers of entries (FairKV, arXiv 2502.15804).

Threads of the native kernels are the limit of it. They share one memory, so that every head may be copied to every thread
at no price, and a copy serves a part of its head's entries in place of a part of the batch: the heads lie end to end and
are cut into equal shares (`split` in ``kernels/native/driver.cpp``). These are the loads of `balanced` with as many copies
as there can be, by one cut less than there are threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbudget.errors import KVBudgetError

STEPS = 50_000
"""Assignments that an exact search tries before it settles for the best found."""


@dataclass(frozen=True)
class Placement:
    """KV heads of one layer on devices: ``heads[p]`` are those of device p; a head on several serves a part of the batch each."""

    heads: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if any(len(set(own)) < len(own) for own in self.heads):
            raise KVBudgetError(f"a device holds a head twice in {self.heads}")

    def copies(self, head: int) -> int:
        """Devices that hold this head."""
        return sum(head in own for own in self.heads)

    def loads(self, entries: Sequence[float]) -> list[float]:
        """Entries that each device attends to per sequence, where head h keeps ``entries[h]``."""
        return [sum(entries[h] / self.copies(h) for h in own) for own in self.heads]

    def slowest(self, entries: Sequence[float]) -> float:
        """The load that all devices wait for."""
        return max(self.loads(entries))


def contiguous(heads: int, devices: int) -> Placement:
    """Plain tensor parallelism: equal numbers of neighboring heads; with fewer heads than devices, neighbors share one.

    >>> contiguous(8, 3).heads
    ((0, 1, 2), (3, 4, 5), (6, 7))
    >>> contiguous(2, 4).heads
    ((0,), (0,), (1,), (1,))
    """
    if min(heads, devices) < 1:
        raise KVBudgetError(f"{heads} heads cannot be placed on {devices} devices; give at least 1 of each")
    if devices >= heads:
        return Placement(tuple((p * heads // devices,) for p in range(devices)))
    most, larger = heads // devices, heads % devices
    begins = [p * most + min(p, larger) for p in range(devices + 1)]
    return Placement(tuple(tuple(range(begins[p], begins[p + 1])) for p in range(devices)))


def balanced(entries: Sequence[float], devices: int, extra: int = 0) -> Placement:
    """A placement whose slowest device has as little to do as possible, with up to ``extra`` copies of heads.

    Heads are partitioned by an exact search that begins with the longest one first (for many heads it ends with the best
    found). Copies are added one at a time to the head whose copy helps most, and as many of them are taken as help; a
    copied head counts ``entries / copies`` on each of its devices. With ``heads * (devices - 1)`` copies every device has
    all heads for its part of the batch, and none waits. Where plain tensor parallelism is as good, it is kept.

    >>> balanced([6.0, 1.0, 1.0, 4.0], 2).loads([6.0, 1.0, 1.0, 4.0])
    [6.0, 6.0]
    >>> balanced([8.0, 2.0], 2, extra=1).loads([8.0, 2.0])
    [6.0, 4.0]
    >>> balanced([8.0, 2.0], 2, extra=2).loads([8.0, 2.0])
    [5.0, 5.0]
    """
    plain = contiguous(len(entries), devices)
    if not all(0 <= n < float("inf") for n in entries):
        raise KVBudgetError(f"the numbers of entries {list(entries)} must be finite and at least 0")
    copies, least = [1] * len(entries), sum(entries) / devices
    best = _partition(entries, copies, devices)
    for _ in range(extra):
        tried = []
        for head, number in enumerate(copies):
            if number < devices:
                more = [n + (h == head) for h, n in enumerate(copies)]
                tried.append((_partition(entries, more, devices), more))
        if not tried or best.slowest(entries) <= least * (1 + 1e-12):
            break
        found, copies = min(tried, key=lambda pair: pair[0].slowest(entries))
        if found.slowest(entries) < best.slowest(entries) * (1 - 1e-12):
            best = found
    spare = sum(map(len, plain.heads)) - len(entries)
    plain_allowed = spare <= extra and plain.slowest(entries) <= best.slowest(entries) * (1 + 1e-12)
    return plain if plain_allowed else best


def _partition(entries: Sequence[float], copies: Sequence[int], devices: int) -> Placement:
    """The best partition of all copies found by depth-first search in falling order of load."""
    pieces = sorted(((entries[h] / n, h) for h, n in enumerate(copies) for _ in range(n)), key=lambda p: (-p[0], p[1]))
    least = sum(entries) / devices
    loads, own = [0.0] * devices, [[] for _ in range(devices)]  # type: ignore[var-annotated]
    best: list[tuple[int, ...]] = []
    lowest, steps = float("inf"), 0

    def place(index: int) -> None:
        nonlocal best, lowest, steps
        steps += 1
        if index == len(pieces):
            best, lowest = [tuple(sorted(heads)) for heads in own], max(loads)
            return
        load, head = pieces[index]
        tried: set[float] = set()
        for p in sorted(range(devices), key=lambda p: loads[p]):
            # Devices with one load are alike, but for the copies that they hold.
            if head in own[p] or loads[p] + load >= lowest or (copies[head] == 1 and loads[p] in tried):
                continue
            tried.add(loads[p])
            loads[p] += load
            own[p].append(head)
            place(index + 1)
            own[p].pop()
            loads[p] -= load
            if steps > STEPS or lowest <= least * (1 + 1e-12):
                return

    place(0)
    return Placement(tuple(best))


@dataclass(frozen=True)
class Balance:
    """How evenly a placement per layer loads its devices: entries that one device waits for, summed over layers.

    ``slowest`` is that sum for the busiest device of each layer, ``mean`` what perfect balance would need; attention time is
    in proportion where it is bound by reading the cache.
    """

    slowest: float
    mean: float

    @property
    def efficiency(self) -> float:
        """Mean over slowest: 1 when no device waits."""
        return self.mean / self.slowest if self.slowest else 1.0


def balance(placements: Sequence[Placement], kept: Sequence[Sequence[float]]) -> Balance:
    """Balance of layers that keep ``kept[l][h]`` entries; layers are barriers, so each waits for its own slowest device."""
    devices = len(placements[0].heads)
    slowest = sum(placement.slowest(entries) for placement, entries in zip(placements, kept, strict=True))
    return Balance(slowest, sum(map(sum, kept)) / devices)
