"""CacheReport: what a cache keeps and what it costs, as a value that prints as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import LinearAttentionLayer

from kvbudget.budget import format_bytes

if TYPE_CHECKING:
    from kvbudget.cache import KVCache


@dataclass(frozen=True)
class CacheReport:
    """Counts and bytes of a cache at one moment.

    ``seen[b]`` tokens of each sequence; ``kept[l][b][h]`` entries per budgeted layer, sequence and KV head; ``parts`` bytes
    by what they hold; ``full_bytes`` what an unbudgeted cache of the same text would hold in its keys and values.
    ``question_visible`` says whether the question was part of the text when it was compressed (None: not known); ``reason``
    why this policy was chosen, where ``policy="auto"`` chose it.
    """

    policy: str
    budget: str
    seen: list[int]
    kept: list[list[list[int]]]
    parts: dict[str, int]
    nbytes: int
    peak_bytes: int
    full_bytes: int
    evictions: int
    question_visible: bool | None
    reason: str | None = None

    @classmethod
    def of(cls, cache: KVCache) -> CacheReport:
        """Reads the cache."""
        parts: dict[str, int] = {}
        for layer in cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                states = (*layer.conv_states.values(), *layer.recurrent_states.values())
                size = sum(x.untyped_storage().nbytes() for x in states if x is not None)
                parts["recurrent states"] = parts.get("recurrent states", 0) + size
        for store in cache.stores:
            for name, size in store.parts().items():
                parts[name] = parts.get(name, 0) + size
        nbytes = cache.nbytes
        return cls(
            policy=str(cache.policy),
            budget=str(cache.budget),
            seen=cache.seen,
            kept=[store.kept() for store in cache.enforcer.layers],
            parts=parts,
            nbytes=nbytes,
            peak_bytes=max(cache.peak_bytes, nbytes),
            full_bytes=sum(cache.geometry.cache_bytes(seen, cache.dtype.itemsize) for seen in cache.seen),
            evictions=cache.enforcer.evictions,
            question_visible=cache.question_visible,
            reason=cache.reason,
        )

    @property
    def kept_entries(self) -> int:
        """Entries over all budgeted layers, sequences and KV heads."""
        return sum(n for layer in self.kept for row in layer for n in row)

    @property
    def seen_entries(self) -> int:
        """Entries that an unbudgeted cache would hold in the same layers."""
        return sum(seen * len(row) for layer in self.kept for seen, row in zip(self.seen, layer, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the totals."""
        return asdict(self) | {"kept_entries": self.kept_entries, "seen_entries": self.seen_entries}

    def __str__(self) -> str:
        share = self.kept_entries / max(self.seen_entries, 1)
        visible = {True: "yes", False: "no", None: "not known"}[self.question_visible]
        lines = [
            f"policy {self.policy}, budget {self.budget}" + (f" (auto: {self.reason})" if self.reason else ""),
            f"seen {', '.join(map(str, self.seen)) or 0} tokens; kept {self.kept_entries} of {self.seen_entries} entries "
            f"({share:.1%}) in {self.evictions} evictions",
            f"resident {format_bytes(self.nbytes)}, peak {format_bytes(self.peak_bytes)}; "
            f"the full cache would hold {format_bytes(self.full_bytes)}",
            "bytes: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size),
            f"question visible when compressed: {visible}",
        ]
        for index, layer in enumerate(self.kept):
            rows = " | ".join(" ".join(map(str, row)) for row in layer)
            lines.append(f"layer {index:>3}: kept per head {rows}")
        return "\n".join(lines)
