"""KVSharer's search: which layers bear reading the entries of an earlier, dissimilar one."""

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
from kvbudget.methods.cla import CLA


@dataclass(frozen=True)
class SharingSearch(TextCalibration):
    """Greedy search over pairs of layers, most different first (KVSharer, arXiv 2410.18517, section 3).

    The distance of two layers is ``0.5 (mean ||K_i - K_j|| + mean ||V_i - V_j||)`` over tokens, of keys and values averaged
    over the texts. A pair is accepted where the cosine between the final hidden states of all texts, flattened, with and
    without the map stays above ``threshold`` on average; a layer that is shared already, or whose owner is, is followed to
    its root. The artifact holds ``owners [l]`` over the layers that a budget governs.

    Attributes:
        count: number of texts (paper: 30).
        length: tokens of each (paper: 64).
        share: of the layers that shall read another's entries (paper: 0.125 in its code, up to 0.3).
        threshold: least cosine, from 0 on (paper: 0.5, which is lenient).
        similar: go from the least to the most different pair, against the paper.
    """

    method: ClassVar[str] = "kvsharer"

    count: int = 30
    length: int = 64
    share: float = 0.125
    threshold: float = 0.5
    similar: bool = False

    def __post_init__(self) -> None:
        if not (self.share < 1 and self.threshold <= 1):
            raise PolicyError(f"kvsharer: share={self.share} must be below 1 and threshold={self.threshold} a cosine")

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        sums: dict[str, list[Tensor]] = {"keys": [], "values": []}

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            for name, x in (("keys", call.key), ("values", call.value)):
                sums[name].append(x[0].transpose(0, 1).flatten(1).float().cpu())

        watch(model, ids, look)
        found = {name: torch.stack(x) + state.get(name, 0.0) for name, x in sums.items()}
        texts = torch.cat([state["texts"], ids.cpu()]) if state else ids.cpu()
        return found | {"texts": texts}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        layers, texts = len(state["keys"]), state["texts"].to(model.device)
        distance = sum(
            (x[:, None] - x[None]).norm(dim=-1).mean(-1) / (2 * self.count) for x in (state["keys"], state["values"])
        )
        assert isinstance(distance, Tensor)
        pairs = [(float(distance[i, j]), i, j) for i in range(layers) for j in range(i)]
        owners, target = list(range(layers)), _hidden(model, texts, tuple(range(layers)))
        wanted = round(self.share * layers)
        for _, i, j in sorted(pairs, reverse=not self.similar):
            if sum(owner != at for at, owner in enumerate(owners)) == wanted:
                break
            if owners[i] != i:
                continue
            tried = [owners[j] if owner == i else owner for owner in owners]
            cosine = cosine_similarity(_hidden(model, texts, tuple(tried)), target, dim=-1).mean()
            if float(cosine) > self.threshold:
                owners = tried
        return {"owners": torch.tensor(owners)}


def _hidden(model: PreTrainedModel, texts: Tensor, owners: tuple[int, ...]) -> Tensor:
    """Final hidden states of texts ``[n, T]`` under a map, flattened: float32 ``[n, T * H]``."""
    cache = KVCache(model, CLA(owners=owners))
    with torch.inference_mode():
        out = model.base_model(texts, past_key_values=cache, use_cache=True).last_hidden_state
    return out.flatten(1).float()
