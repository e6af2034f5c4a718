"""The principal components of a model's cache over texts, for caches that are saved transform-coded."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.samples import SIDES, CacheSamples
from kvbudget.codecs.transform import Transform
from kvbudget.storage.coded import METHOD


@dataclass(frozen=True)
class CacheTransform(CacheSamples):
    """Principal components over all layers and heads together, keys before RoPE and values apart (arXiv 2511.01815).

    The artifact holds, for ``key`` and ``value``, the fields of `kvbudget.codecs.transform.Transform`; the bases in float16.

    Attributes:
        rank: components that are kept at most.
    """

    method: ClassVar[str] = METHOD

    rows: int = 512
    rank: int = 1536

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for side in SIDES:
            fitted = Transform.fit(state[side], self.rank)
            for name in ("mean", "basis", "scale", "rate", "loss"):
                x = getattr(fitted, name)
                tensors[f"{side}.{name}"] = x.half() if name == "basis" else x
        return tensors
