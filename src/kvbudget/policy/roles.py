"""Roles: the contracts of the parts that judge, share out, read and receive entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.lane import Sum

if TYPE_CHECKING:
    from kvbudget.costs import EntryCost
    from kvbudget.layer import LayerCache
    from kvbudget.policy.view import View
    from kvbudget.segments.base import Segment
    from kvbudget.segments.selective import Chosen, Reading

Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Base of every part of a policy: a frozen value with plain fields, so that it prints, compares and hashes.

    ``uses_marks`` says that the part looks at `View.marks`, which `kvbudget.prefill` makes from the tokenizer.
    """

    uses_marks: ClassVar[bool] = False


@dataclass(frozen=True)
class Scorer(Part, ABC):
    """Judges entries: higher means keep. ``states`` names the running per-entry state columns it keeps (float32).

    ``aligned`` scorers give all KV heads of a layer the same scores, computed over heads that hold the same entries; they
    cannot go together with an allocator over heads. ``rotates`` scorers use `View.rotation`, so models whose keys follow no
    verified rotation are refused. ``by_position`` scorers look at positions alone, and say the same in all heads and layers.
    """

    states: ClassVar[tuple[str, ...]] = ()
    aligned: ClassVar[bool] = False
    by_position: ClassVar[bool] = False
    rotates: ClassVar[bool] = False

    def fixed_bytes(self, key_dim: int, group: int) -> float:
        """Bytes per sequence and KV head of the scorer's own statistics (`View.set_statistic`), whatever is kept.

        ``group`` query heads of ``key_dim`` elements read one KV head.
        """
        return 0.0

    def sums(self, new: int) -> tuple[Sum, ...]:
        """The attention mass that `observe` adds to states where a forward brings a sequence ``new`` tokens.

        Only the decay may depend on ``new``: all sequences of a batch share names, queries and groups.
        """
        return ()

    def observe(self, view: View) -> None:
        """Updates running states after the attention of a forward; `View` then covers the new entries too.

        Where this is left as it is, decode steps add the `sums` without it.
        """
        for each in zip(*map(self.sums, view.new_tokens), strict=True):
            view.add_mass(each[0].name, each[0].last, [one.decay for one in each], each[0].group)

    def probe(self, view: View, spans: Sequence[Span]) -> None:
        """Updates running states in an extra pass that a plan runs on top of the cache; its tokens are not held.

        ``spans[b]`` are the positions that the pass judges (an empty range where sequence b has none any more).
        """

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Scores ``[B, Hkv, T]`` float32 of the layer's evictable entries (padding cells are ignored)."""


@dataclass(frozen=True)
class LayerAllocator(Part, ABC):
    """Shares the cache's entries out over layers by weights; the solver makes integers of them.

    Every layer holds its protected entries (sinks, recent window, marked spans), and the weights share out the others, as
    the papers do. ``measures`` says that `preference` looks at a layer after the attention of a forward; layers that have
    not been measured have no weight yet (they hold nothing either), so those that have share the total: a cascade.
    """

    measures: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    """Entries of all layers compete (`rank`), so evictions wait for the end of a forward, or of a round (`ends_round`)."""

    def ends_round(self, index: int) -> bool:
        """Whether a ``joint`` allocator ranks and evicts after layer ``index`` too: the layers so far share the total."""
        return False

    def rank(self, scores: Sequence[Tensor], total: int) -> list[float]:
        """Entries of one sequence that each layer may keep of ``total``, from all layers' ``scores[l] [Hkv, T_l]``.

        Protected entries have the score +inf and empty cells -inf; the result is what `weights` gets as measured.
        """
        raise NotImplementedError

    def leader(self, index: int) -> int:
        """The layer, of those that a budget governs, whose entries layer ``index`` keeps too: itself or an earlier one.

        Layers between the two have the same leader, all of them get the same, and only the leader's scores are taken.
        """
        return index

    def preference(self, view: View, last: Sequence[float | None]) -> Sequence[float | None]:
        """Statistic of one layer per sequence, given what this returned ``last`` (None: not measured yet)."""
        return last

    @abstractmethod
    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        """Weights of the layers of one sequence; ``measured[l]`` is the layer's last `preference`.

        ``mean`` and ``floor`` are entries per layer and KV head: what a uniform split would give, and what is protected.
        """


@dataclass(frozen=True)
class HeadAllocator(Part, ABC):
    """Shares a layer's entries out over its KV heads.

    Heads that are `pinned` keep every entry; the budget is solved for what is left to the others, and `split` sees those
    alone. ``bounded`` says that `most` limits them without any budget. ``statistic`` names what `split` asks of the scorer.
    """

    statistic: ClassVar[str | None] = None

    @property
    def bounded(self) -> bool:
        return False

    def pinned(self, layer_idx: int) -> Container[int]:
        """KV heads of one layer of the model that keep everything."""
        return ()

    def of_layer(self, layer_idx: int) -> HeadAllocator:
        """The allocator for one layer of the model, where layers differ."""
        return self

    def most(self, seen: int) -> int:
        """Entries that a head that is not pinned keeps at most, of ``seen`` tokens."""
        return seen

    @abstractmethod
    def split(
        self, scores: Tensor, protected: Tensor, valid: Tensor, total: int, hint: Tensor | None = None
    ) -> list[int]:
        """Entries per KV head, summing to ``total``, from one sequence's ``scores, protected, valid [Hkv, T]``.

        ``hint [Hkv, ...]`` is the scorer's running `statistic` of these heads, if there is one yet.
        """


@dataclass(frozen=True)
class Refinement(Part, ABC):
    """Scores that depend on how many entries may stay: a second look between the allocation and the selection."""

    @abstractmethod
    def refine(self, view: View, scores: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        """New scores ``[B, Hkv, T]``, of which the best ``counts [B, Hkv]`` of each row are kept, protected ones first."""


@dataclass(frozen=True)
class Selector(Part, ABC):
    """What a query reads of the entries that are held, and with what weights; nothing leaves the cache by it.

    ``prefill`` says that it acts where a forward brings many tokens, too. ``states`` as for a `Scorer`.
    """

    prefill: ClassVar[bool] = True
    states: ClassVar[tuple[str, ...]] = ()

    def meet(self, layer_idx: int, keys: Tensor, positions: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fills in the ``states [B, Hkv, T]`` of entries that it has not met yet, which are 0.

        ``keys [B, Hkv, T, D]`` in float32, ``positions [B, Hkv, T]`` (-1: an empty cell).
        """

    @abstractmethod
    def select(self, reading: Reading) -> Chosen:
        """Weights of the values, and of their mean as a compensation for what is not read."""


@dataclass(frozen=True)
class LookingBack(Part, ABC):
    """A selector for forwards of few tokens in which the newest ``window`` queries share what each of them reads.

    What a query has missed completes its stored answer (`kvbudget.segments.retrospective`), and a driver takes its token
    through the layers again. ``states`` as for a `Scorer`.
    """

    states: ClassVar[tuple[str, ...]] = ()

    window: int = 2

    @abstractmethod
    def read(self, layer_idx: int, query: Tensor, keys: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Which of the ``visible [B, Hkv, n, T]`` entries each query reads: bool of the same shape.

        ``query [B, Hkv, G, n, D]`` and ``keys [B, Hkv, T, D]`` in float32, ``positions [B, Hkv, T]`` (-1: an empty cell).
        """

    def fixed_bytes(self, value_dim: int, group: int) -> float:
        """Bytes per sequence and KV head of the stored answers."""
        return (self.window - 1) * group * 4.0 * (value_dim + 1)


@dataclass(frozen=True)
class Evicted:
    """What leaves a layer in one eviction, flat in row order: ``key, value [N, D]``, ``position, score [N]``, counts ``[R]``.

    ``count [N]`` are the entries that each stands for, where the layer keeps such a column; ``kept_score`` are the scores of
    what stays, flat in row order.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    score: Tensor
    counts: list[int]
    count: Tensor | None = None
    kept_score: Tensor | None = None

    @classmethod
    def join(cls, pieces: Sequence[tuple[Sequence[Tensor], list[int]]], kept_score: Tensor | None = None) -> Evicted:
        """Joins what left several segments of a layer, row by row: key, value, position, score and count, if there is one."""
        counts = [sum(rows) for rows in zip(*(piece[1] for piece in pieces), strict=True)]
        columns = []
        for index in range(len(pieces[0][0])):
            parts = [torch.split(piece[0][index], piece[1]) for piece in pieces]
            columns.append(torch.cat([part[r] for r in range(len(counts)) for part in parts]))
        key, value, position, score, *count = columns
        return cls(key, value, position, score, counts, count[0] if count else None, kept_score)


@dataclass(frozen=True)
class Destination(Part, ABC):
    """What happens to entries that are not kept in place. It may hold segments of its own in front of the layer's."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Extra per-entry columns (float32) that the destination keeps with the layer's entries, such as ``count``."""
        return ()

    def entry_bytes(self, key_dim: int, value_dim: int) -> float:
        """Bytes of one entry in the destination's own segments; 0 when their size does not grow with their number."""
        return 0.0

    def fixed_bytes(self, key_dim: int, value_dim: int, itemsize: int) -> float:
        """Bytes per sequence and KV head that the destination may hold beside the entries, whatever their number."""
        return 0.0

    def make_segment(self, num_rows: int, key_dim: int, value_dim: int, device: torch.device | None = None) -> Segment:
        """An empty segment as the destination holds them in front of the layer's own."""
        return DenseSegment(num_rows)

    def main_entries(self, nbytes: float, cost: EntryCost, seen: int, floor: int) -> float:
        """Entries per KV head that stay in place when a head may hold ``nbytes`` and ``seen`` tokens have been seen.

        At least ``floor`` of them (as far as seen) have to; what is left of ``nbytes`` goes to the own segments.
        """
        return nbytes / cost.per_entry

    def observe(self, view: View) -> None:
        """Updates ``view.layer.statistics`` after the attention of a forward, before anything is evicted."""

    @abstractmethod
    def receive(self, layer: LayerCache, evicted: Evicted) -> None:
        """Takes the evicted entries after the kept ones have been gathered."""

    def limit(self, layer: LayerCache, counts: Sequence[int]) -> None:
        """Drops what the own segments hold beyond ``counts[r]`` entries of each row (a byte budget ends there)."""
        raise NotImplementedError
