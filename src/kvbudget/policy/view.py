"""View: what a policy may look at when it watches or judges a layer; everything is computed when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked
from kvbudget.kernels.reference import capped
from kvbudget.policy.scoring import Reduction

if TYPE_CHECKING:
    from kvbudget.layer import LayerCache
    from kvbudget.models import Rotation

BLOCK = 2**22
"""Attention weights that are held at a time."""


@dataclass
class Queries:
    """The model's own post-RoPE queries of one forward, with the log-sum-exp of their attention.

    ``query [B, Hq, n, D]``, ``lse [B, Hq, n]`` float32, ``valid [B, n]`` bool or None when no row is padded. ``own`` is the
    part of ``lse`` that does not stem from held entries (set in the extra passes of a plan, whose tokens are not held).
    ``steps [B, n]`` are their positions where they do not follow each other (then padding is on the left).
    """

    query: Tensor
    lse: Tensor
    scale: float
    softcap: float | None = None
    valid: Tensor | None = None
    own: Tensor | None = None
    steps: Tensor | None = None

    def last(self, count: int | None) -> tuple[Tensor, Tensor]:
        """The newest ``count`` queries of each sequence, right-aligned: ``[B, Hq, W, D]`` and lse ``[B, Hq, W]``.

        Sequences with fewer have ``lse = +inf`` in front, which gives those rows weight zero everywhere.
        """
        new = self.query.shape[2]
        width = new if count is None else min(count, new)
        if self.valid is None:
            at = slice(new - width, None)
            return (self.query, self.lse) if width == new else (self.query[:, :, at], self.lse[:, :, at])
        # A stable sort brings the valid columns to the right in order, whatever the padding side.
        order = torch.argsort(self.valid.int(), dim=1, stable=True)[:, -width:]
        present = self.valid.gather(1, order)
        index = order[:, None, :].expand(-1, self.query.shape[1], -1)
        query = self.query.gather(2, index[..., None].expand(-1, -1, -1, self.query.shape[-1]))
        lse = self.lse.gather(2, index).masked_fill(~present[:, None, :], float("inf"))
        return query, lse

    def without_newest(self, count: int) -> Queries | None:
        """All but the last ``count`` query steps; None when that leaves nothing."""
        rest = self.query.shape[2] - count
        if rest <= 0:
            return None
        valid = None if self.valid is None else self.valid[:, :rest]
        return replace(self, query=self.query[:, :, :rest], lse=self.lse[:, :, :rest], valid=valid)


class View:
    """One layer's evictable entries, padded to ``[B, Hkv, T]``, and the queries of the forward that is under way."""

    def __init__(self, layer: LayerCache, queries: Queries | None = None) -> None:
        self.layer = layer
        self.queries = queries

    @property
    def batch_size(self) -> int:
        return self.layer.batch_size

    @property
    def num_kv_heads(self) -> int:
        return self.layer.num_kv_heads

    @property
    def layer_idx(self) -> int:
        return self.layer.layer_idx

    @property
    def seen(self) -> list[int]:
        """Tokens seen per sequence."""
        return self.layer.seen

    @property
    def age(self) -> int | Tensor:
        """`seen` as it goes with `positions`: one number where it is the same for all sequences, else ``[B, 1, 1]``."""
        return (
            self.seen[0]
            if len(set(self.seen)) == 1
            else torch.tensor(self.seen, device=self.positions.device)[:, None, None]
        )

    @property
    def prompt(self) -> list[int]:
        """Tokens per sequence of the prompt: what came first, or is announced by a prefill."""
        return self.layer.prompt

    @property
    def new_tokens(self) -> list[int]:
        """Tokens of this forward per sequence, padding left out (0 outside of a forward)."""
        queries, batch = self.queries, len(self.layer.seen)
        if queries is None:
            return [0] * batch
        return [queries.query.shape[2]] * batch if queries.valid is None else queries.valid.sum(1).tolist()

    @cached_property
    def valid(self) -> Tensor:
        """Cells that hold an entry: bool ``[B, Hkv, T]``."""
        return self.positions >= 0

    @cached_property
    def positions(self) -> Tensor:
        """Positions in the text, -1 in empty cells: ``[B, Hkv, T]``."""
        return self._heads(torch.cat([segment.positions() for segment in self.layer.main], dim=1))

    @property
    def keys(self) -> Tensor:
        """Keys in full precision ``[B, Hkv, T, D]`` (post-RoPE)."""
        return self._heads(torch.cat([segment.keys() for segment in self.layer.main], dim=1))

    @property
    def values(self) -> Tensor:
        """Values in full precision ``[B, Hkv, T, Dv]``."""
        return self._heads(torch.cat([segment.values() for segment in self.layer.main], dim=1))

    def state(self, name: str) -> Tensor:
        """A running state column, float32 ``[B, Hkv, T]``."""
        return self._heads(torch.cat([segment.meta.padded(name) for segment in self.layer.main], dim=1))

    def set_state(self, name: str, values: Tensor) -> None:
        """Overwrites a running state column with ``[B, Hkv, T]``."""
        flat = values.flatten(0, 1)
        begin = 0
        for segment in self.layer.main:
            segment.meta.write_padded(name, flat[:, begin : begin + segment.longest].float())
            begin += segment.longest

    @property
    def rotation(self) -> Rotation:
        """How the layer's keys and queries rotate with position (for scorers that say ``rotates``)."""
        assert self.layer.rotation is not None, "the scorer does not say that it rotates"
        return self.layer.rotation  # type: ignore[return-value]

    def statistic(self, name: str) -> Tensor | None:
        """A running statistic of the layer, ``[B, Hkv, ...]``; None before it is first set."""
        rows = self.layer.statistics.get(name)
        return None if rows is None else self._heads(rows)

    def set_statistic(self, name: str, values: Tensor) -> None:
        """Replaces a running statistic by ``[B, Hkv, ...]``; its bytes must be in `Scorer.fixed_bytes`."""
        self.layer.statistics[name] = values.flatten(0, 1)

    @cached_property
    def marks(self) -> Tensor:
        """What kinds of tokens the entries belong to (`kvbudget.policy.marks`): uint8 ``[B, Hkv, T]``, 0 where unknown."""
        found = torch.zeros_like(self.positions, dtype=torch.uint8)
        for b, marks in enumerate(self.layer.marks):
            known = (self.positions[b] >= 0) & (self.positions[b] < len(marks))
            found[b][known] = marks.to(found.device)[self.positions[b][known].long()]
        return found

    def add_mass(
        self,
        name: str,
        last: int | None = None,
        decay: Sequence[float] | None = None,
        group: Reduction = "mean",
        weights: Tensor | None = None,
    ) -> None:
        """Adds the attention that entries received from the newest ``last`` queries (None: all) to a state column.

        Weights are those of the softmax over everything the layer holds, summed over queries, then reduced over the GQA
        group; the state is first multiplied by ``decay[b]`` of its sequence (None: 1). ``weights`` are those of the queries,
        of which the newest has the last.
        """
        queries, layer = self._asked(), self.layer
        one = queries.valid is None and queries.query.shape[2] == 1
        query, lse = (queries.query, queries.lse) if one else queries.last(last)
        weight = 1.0
        if weights is not None and one:  # whose logits may have been kept, and are met with the lse that they had
            weight = float(weights[-1])
        elif weights is not None:
            lse = lse - weights[-lse.shape[-1] :].log()
        members = query.shape[1] // layer.num_kv_heads
        fading = decay or [1.0] * len(layer.seen)
        if group != "max" or members == 1:
            layer.add_mass(name, query, lse, queries, fading, weight / members if group == "mean" else weight)
            return
        rows_decay = [d for d in fading for _ in range(layer.num_kv_heads)]
        each = [slice(g, None, members) for g in range(members)]
        for found in zip(*(list(self.layer.masses(query[:, at], lse[:, at], queries)) for at in each), strict=True):
            rows = [torch.stack(row).amax(0) for row in zip(*(mass for _, mass in found), strict=True)]
            found[0][0].add_to_state(name, rows, rows_decay, weight)

    def window_attention(self, last: int) -> Tensor:
        """Attention weights of the newest ``last`` queries: float32 ``[B, Hkv, G, W, T]``, causal, over all entries.

        The softmax runs over everything that the layer holds (window included), so a row sums to at most one here.
        """
        queries = self._asked()
        query, lse = queries.last(last)
        width, parts = query.shape[2], []
        for segment, rows in self.layer.masses(query, lse, queries, summed=False):
            parts.append(_padded(rows, segment.longest).unflatten(1, (-1, width)))
        return self._heads(torch.cat(parts, dim=-1))

    def mass(self, last: int | None = None) -> Tensor:
        """Attention that entries receive from the newest ``last`` queries (None: all): float32 ``[B, Hkv, T]``.

        Summed over queries, mean over the GQA group; what `add_mass` adds to a state.
        """
        queries = self._asked()
        query, lse = queries.last(last)
        parts = [_padded(rows, segment.longest) for segment, rows in self.layer.masses(query, lse, queries)]
        return self._heads(torch.cat(parts, dim=-1)) * (self.num_kv_heads / query.shape[1])

    def attention_rows(self, last: int | None = None, block: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """`window_attention` of the newest ``last`` queries (None: all), in blocks of ``block`` queries (0: a few MiB each).

        Yields weights ``[B, Hkv, G, w, T]`` and the positions of their queries ``[B, w]``, -1 where a sequence has fewer
        (their weights are 0).
        """
        queries = self._asked()
        query, lse = queries.last(last)
        heads = self.num_kv_heads
        keys = self.keys.float()
        log_count = None
        if all("count" in segment.meta.columns for segment in self.layer.main):
            log_count = self.state("count").clamp_min(1e-30).log()[:, :, None, None, :]
        query, lse = query.unflatten(1, (heads, -1)), lse.unflatten(1, (heads, -1))
        steps = self._steps(query.shape[3])
        size = block or max(1, BLOCK // (query[:, :, :, 0, 0].numel() * max(1, keys.shape[2])))
        for begin in range(0, query.shape[3], size):
            at = slice(begin, begin + size)
            logits = torch.einsum("bhgwd,bhtd->bhgwt", query[:, :, :, at].float(), keys) * queries.scale
            logits = capped(logits, queries.softcap)
            if log_count is not None:
                logits = logits + log_count
            allowed = self.positions[:, :, None, None, :] <= steps[:, None, None, at, None]
            allowed &= self.valid[:, :, None, None, :]
            weights = logits.sub_(lse[:, :, :, at, None]).exp_().masked_fill_(~allowed, 0.0)
            yield weights, steps[:, at]

    def query_steps(self) -> Tensor:
        """Positions of this forward's queries ``[B, n]``, right-aligned as `Queries.last`; -1 for padding."""
        return self._steps(self._asked().query.shape[2])

    def asked(self) -> Asked | None:
        """This forward's queries by rows, as codecs see them; None outside of a forward."""
        if self.queries is None:
            return None
        query, lse = self.queries.last(None)
        query, lse = (x.unflatten(1, (self.num_kv_heads, -1)).flatten(0, 1) for x in (query, lse))
        steps = self.query_steps().repeat_interleave(self.num_kv_heads, dim=0)
        return Asked(query, lse, steps, self.queries.scale, self.queries.softcap)

    def _steps(self, width: int) -> Tensor:
        device = self._asked().query.device
        if self._asked().steps is not None:
            return self._asked().steps[:, -width:]  # type: ignore[index]
        steps = torch.tensor(self.seen, device=device)[:, None] - width + torch.arange(width, device=device)
        fresh = torch.tensor(self.new_tokens, device=device)[:, None]
        return steps.masked_fill(torch.arange(width, device=device) < width - fresh, -1)

    def _asked(self) -> Queries:
        if self.queries is None:
            raise AssertionError("a scorer looked for queries outside of a forward; it must keep a state instead")
        return self.queries

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.batch_size, self.num_kv_heads))


def _padded(rows: Sequence[Tensor], longest: int) -> Tensor:
    """Stacks ``rows[r] [..., T_r]``, filled up with zeros to ``longest`` cells."""
    out = rows[0].new_zeros(len(rows), *rows[0].shape[:-1], longest, dtype=torch.float32)
    for cells, row in zip(out, rows, strict=True):
        cells[..., : row.shape[-1]] = row
    return out
