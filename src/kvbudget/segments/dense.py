"""DenseSegment: entries in the model's own precision, ragged over rows."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kvbudget import kernels
from kvbudget.kernels import flash
from kvbudget.kernels.operands import DenseOperand
from kvbudget.kernels.reference import Partial
from kvbudget.segments.base import AttendContext, Segment, Side
from kvbudget.segments.ragged import RaggedTable

# From this many query rows on, torch's matrix kernels beat a kernel that streams the entries once for few queries.
MANY_QUERY_ROWS = 32


class DenseSegment(Segment):
    """Keys ``[*, D]`` and values ``[*, Dv]`` as given; merged entries carry ``count`` and get a log-count logit bias."""

    def __init__(self, num_rows: int) -> None:
        self.meta = RaggedTable(num_rows)

    def append(self, key: Tensor, value: Tensor, meta: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        self.meta.append({"key": key, "value": value, **meta}, counts)

    def attend(self, query: Tensor, ctx: AttendContext) -> Partial:
        table = self.meta
        few = query.shape[1] < MANY_QUERY_ROWS
        plain = ctx.softcap is None and ctx.window is None and ctx.causal_tail <= 1 and all(table.lengths)
        if plain and not (few and kernels.backend().name == "native") and flash.applies(query, table.columns["value"]):
            return self._flash(query, ctx)
        return kernels.attend(query, self._operand("key"), self._operand("value"), table.lengths, **self._bias(ctx))

    def mass(self, query: Tensor, lse: Tensor, ctx: AttendContext) -> list[Tensor]:
        return kernels.mass(query, self._operand("key"), self.meta.lengths, lse, **self._bias(ctx))

    def keys(self) -> Tensor:
        return self.meta.padded("key")

    def row_keys(self, row: int, begin: int, end: int) -> Tensor:
        return self.meta.row("key", row)[begin:end]

    def values(self) -> Tensor:
        return self.meta.padded("value")

    def writable(self, row: int) -> tuple[Tensor, Tensor]:
        self.meta.own("key")
        self.meta.own("value")
        return self.meta.row("key", row), self.meta.row("value", row)

    def take(self, keep: Tensor, spare: int | Sequence[int] = 0) -> None:
        """As of any segment; ``spare`` may differ from row to row."""
        self.meta.take(keep, spare)

    def gather(self, keep: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], list[int]]:
        meta, counts = self.meta.gather(keep)
        return meta.pop("key"), meta.pop("value"), meta, counts

    def branch(self, hard: bool) -> Segment:
        return DenseSegment(self.num_rows) if self.shared else self

    def absorb(self, trail: Sequence[Segment], spare: int = 0) -> None:
        segments = (self, *trail)
        self.meta.reserve([sum(rows) + spare for rows in zip(*(s.lengths for s in segments), strict=True)])
        for segment in trail:
            self.meta.append({name: segment.meta.flat(name) for name in segment.meta.columns}, segment.lengths)

    def truncate(self, lengths: Sequence[int]) -> None:
        self.meta.truncate(lengths)

    def can_truncate(self, lengths: Sequence[int]) -> bool:
        return True

    def tables(self) -> list[RaggedTable]:
        return [self.meta]

    def sides(self) -> tuple[Side, Side] | None:
        if "count" in self.meta.columns or not self.meta.columns:
            return None
        key, value = (Side(None, 1, None, self._operand(name), self.meta) for name in ("key", "value"))
        return key, value

    def parts(self) -> dict[str, int]:
        sizes = {name: column.untyped_storage().nbytes() for name, column in self.meta.columns.items()}
        names = {"key": "keys", "value": "values", "position": "positions", "count": "counts"}
        parts: dict[str, int] = {}
        for name, size in sizes.items():
            label = names.get(name, "states")
            parts[label] = parts.get(label, 0) + size
        return parts

    def _operand(self, name: str) -> DenseOperand:
        return DenseOperand(self.meta.columns[name], self.meta.starts)

    def _bias(self, ctx: AttendContext) -> dict:
        columns = self.meta.columns
        return {
            "scale": ctx.scale,
            "softcap": ctx.softcap,
            "window": ctx.window,
            "causal_tail": ctx.causal_tail,
            "query_positions": ctx.query_positions,
            "positions": columns["position"],
            "log_count": columns["count"].clamp_min(1e-30).log() if "count" in columns else None,
            "entry_starts": self.meta.starts,
        }

    def _flash(self, query: Tensor, ctx: AttendContext) -> Partial:
        table = self.meta
        count = table.columns.get("count")
        if table.uniform:
            bias = None if count is None else table.grid("count").log()
            return flash.grid_attend(query, table.grid("key"), table.grid("value"), scale=ctx.scale, log_count=bias)
        keys, values = ([table.row(name, r) for r in range(table.num_rows)] for name in ("key", "value"))
        counts = None if count is None else [table.row("count", r).log() for r in range(table.num_rows)]
        return flash.ragged_attend(query, keys, values, scale=ctx.scale, log_count=counts)
