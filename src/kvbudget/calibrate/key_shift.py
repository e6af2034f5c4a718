"""How far a layer's keys move when a text is processed in blocks that see little of what came before."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.calibrate.base import TextCalibration, watch
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall


@dataclass(frozen=True)
class KeyShift(TextCalibration):
    """Cosines between keys of full attention and keys of blocks that see sinks and a window (EpiCache, arXiv 2509.17396).

    Each text is run twice, once whole and once in blocks, each of which sees the first ``sinks`` tokens and the newest
    ``overlap * block`` before it. The artifact holds ``similarity [l]`` over the layers that a budget governs: the cosine of
    ``window`` keys side by side, averaged over windows, KV heads and texts.

    Attributes:
        count: number of texts (paper: 1).
        length: tokens of each (paper: about 16000).
        block: tokens of a block (paper: 4096).
        overlap: how far a block sees back, in blocks (paper: 0.5).
        sinks: first tokens that every block sees (paper: 128).
        window: keys that are compared together (paper: 100).
    """

    method: ClassVar[str] = "epicache_layers"

    count: int = 4
    length: int = 1024
    block: int = 256
    overlap: float = 0.5
    sinks: int = 4
    window: int = 100

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        seen_back = int(self.overlap * self.block)
        if not (0 < self.window <= self.length and self.block > 0 and self.sinks >= 0 and seen_back >= 1):
            raise PolicyError(
                f"epicache_layers: window={self.window} must be from 1 to length={self.length}, and block={self.block} times "
                f"overlap={self.overlap} at least 1"
            )
        whole = self._keys(model, [ids], None)
        pieces = list(ids.split(self.block, dim=1))
        cache = KVCache(model, f"streaming_llm(sinks={self.sinks})", self.sinks + seen_back, when="chunk")
        blocks = self._keys(model, pieces, cache)
        found = []
        for one, other in zip(whole, blocks, strict=True):
            pairs = (
                x[:, : self.length // self.window * self.window].unflatten(1, (-1, self.window)) for x in (one, other)
            )
            mine, theirs = (x.flatten(2) for x in pairs)
            found.append(cosine_similarity(mine, theirs, dim=-1).mean())
        return {"sums": torch.stack(found) + state.get("sums", 0.0)}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"similarity": state["sums"] / self.count}

    def _keys(self, model: PreTrainedModel, pieces: list[Tensor], cache: KVCache | None) -> list[Tensor]:
        """The keys ``[Hkv, T, D]`` of each governed layer, of pieces that go through the cache one after the other."""
        keys: dict[int, list[Tensor]] = {}

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            keys.setdefault(index, []).append(call.key[0].float().cpu())

        for piece in pieces:
            watch(model, piece, look, after=cache)
            if cache is not None:
                with torch.inference_mode():
                    model.base_model(piece, past_key_values=cache, use_cache=True)
        return [torch.cat(parts, dim=1) for _, parts in sorted(keys.items())]
