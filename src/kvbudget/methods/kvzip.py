"""KVzip: entries matter that the model looks at when it repeats the context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbudget.layer import LayerCache
from kvbudget.policy.allocators.heads import JointTopK
from kvbudget.policy.allocators.joint import GlobalTopK
from kvbudget.policy.base import Protect, Recipe, Scorer, Span
from kvbudget.policy.plans import Reconstruct
from kvbudget.policy.view import Queries, View

SMALLEST = 1e-30
"""Least score of an entry that a pass has judged: 0 marks those that none has judged yet."""
BLOCK = 2**18
"""Logits that are held at a time, per KV head."""


@dataclass(frozen=True)
class Reconstruction(Scorer):
    """Highest attention that an entry receives from any query that repeats its chunk (KVzip, arXiv 2505.23416, section 3).

    The softmax runs over the first ``sinks`` entries, the chunk and the repeating tokens themselves, causal among these; the
    maximum over repeating queries and over the GQA group, in float32. Entries that no pass has judged, such as generated
    ones, rank above all others, newer ones first.
    """

    states: ClassVar[tuple[str, ...]] = ("score",)

    sinks: int = 4

    def probe(self, view: View, spans: Sequence[Span]) -> None:
        queries = view.queries
        assert queries is not None and queries.own is not None
        heads = view.num_kv_heads
        for b, span in enumerate(spans):
            if span[0] < span[1]:
                for h in range(heads):
                    self._judge(view.layer, b * heads + h, _of_head(queries, b, h, heads), span)

    def score(self, view: View) -> Tensor:
        state = view.state("score")
        return torch.where(state > 0, state, 2.0 + view.positions.float() * 2.0**-22)

    def _judge(self, layer: LayerCache, row: int, queries: Queries, span: Span) -> None:
        """Scores the entries of one row inside ``span`` by ``queries.query [G * n, D]`` with ``lse, own [G * n]``."""
        sinks, _ = _cut(layer, row, (0, min(self.sinks, span[0])))
        chunk, cells = _cut(layer, row, span)
        everything = len(sinks) + len(chunk) == sum(segment.lengths[row] for segment in layer.segments)
        best = torch.full((len(chunk),), float("-inf"), device=chunk.device)
        assert queries.own is not None
        size = max(1, BLOCK // max(1, len(chunk)))
        columns = (queries.query, queries.lse, queries.own)
        for query, lse, own in zip(*(column.split(size) for column in columns), strict=True):
            query = query.float() * queries.scale
            logits = _capped(query @ chunk.T, queries.softcap)
            if not everything:
                first = _capped(query @ sinks.T, queries.softcap)
                lse = torch.stack([own, torch.logsumexp(first, -1), torch.logsumexp(logits, -1)]).logsumexp(0)
            torch.maximum(best, logits.sub_(lse[:, None]).amax(0), out=best)
        score = best.exp().clamp_min(SMALLEST)
        for segment, begin, end in cells:
            segment.meta.own("score")
            segment.meta.row("score", row)[begin:end] = score[: end - begin]
            score = score[end - begin :]


@dataclass(frozen=True)
class KVzip(Recipe):
    """Keeps the entries that the model attends to most when it repeats the context, whatever will be asked later.

    Paper: Kim et al., arXiv 2505.23416, 2025 (NeurIPS), section 3. After the prompt, the model repeats it in chunks of
    ``chunk`` tokens on top of the full cache (`KVCache.prefill` does that); an entry's score is the highest attention that a
    repeating query pays it. One threshold over all layers and heads decides (the paper's "pair"), so that layers and heads
    differ in size; ``uniform`` gives all the same. The first ``sinks`` entries stay (protect a system prompt by
    ``protect="system"``), generated ones leave last. Claim: a 3 to 4 times smaller cache with negligible loss for questions
    that were unknown when it was compressed. The whole prompt must be held first, so byte budgets are refused. The
    reference takes its softmax in the model's precision and drops ties; here float32, and the total is exact.

    Attributes:
        chunk: tokens that one pass repeats (reference: 2000 or 2048).
        overlap: tokens before a chunk that tell where to start.
        sinks: first entries that always stay and take part in every softmax.
        uniform: the same number of entries for all layers and heads.
        instruction_ids: token ids that ask for the repetition, where no tokenizer is at hand or it needs other words.
    """

    name = "kvzip"
    role = "scorer, plan and allocator over layers and heads"
    phase = "after the prefill, by extra passes"
    paper = "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416, 2025"
    needs = ("plan", "queries")
    prefill_peak = "full_prompt"
    prefix_reusable = True

    chunk: int = 2048
    overlap: int = 8
    sinks: int = 4
    uniform: bool = False
    instruction_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "scorer": Reconstruction(self.sinks),
            "plan": Reconstruct(self.chunk, self.overlap, instruction_ids=self.instruction_ids),
            "protect": Protect(sinks=self.sinks),
        }
        return parts if self.uniform else parts | {"layers": GlobalTopK(), "heads": JointTopK(safeguard=0.0)}


def _of_head(queries: Queries, b: int, h: int, heads: int) -> Queries:
    """The queries of one sequence's GQA group ``[G * n, D]``, padding left out."""
    assert queries.own is not None
    groups = queries.query.shape[1] // heads
    at = slice(h * groups, (h + 1) * groups)
    real = slice(None) if queries.valid is None else queries.valid[b]
    query, lse, own = (x[b, at][:, real].flatten(0, 1) for x in (queries.query, queries.lse, queries.own))
    return Queries(query, lse, queries.scale, queries.softcap, own=own)


def _cut(layer: LayerCache, row: int, span: Span) -> tuple[Tensor, list[tuple[Any, int, int]]]:
    """Keys ``[n, D]`` in float32 of a row's entries at positions inside ``span``, and their cells by segment."""
    cells, keys = [], []
    for segment in layer.main:
        if segment.lengths[row]:
            position = segment.meta.row("position", row)
            bounds = torch.tensor(span, dtype=position.dtype, device=position.device)
            begin, end = torch.searchsorted(position, bounds).tolist()
            if begin < end:
                cells.append((segment, begin, end))
            keys.append(segment.row_keys(row, begin, end))
    return torch.cat(keys).float(), cells


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)
