"""The contracts of calibrations: frozen values with the parameters of a fit, and the fit, at once or text by text."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.kernels.reference import capped
from kvbudget.layer import AttentionCall

Look = Callable[[int, AttentionCall, Tensor], None]


@dataclass(frozen=True)
class Calibration(ABC):
    """How a method is fitted to a model once; its fields are the parameters, recorded in the artifact."""

    method: ClassVar[str]

    @abstractmethod
    def fit(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What the method needs to know about this model, as named tensors."""


@dataclass(frozen=True)
class TextCalibration(ABC):
    """A fit to texts of one length, one after the other, so that it can be stopped and resumed between two of them.

    Attributes:
        count: number of texts.
        length: tokens of each.
    """

    method: ClassVar[str]

    count: int = 16
    length: int = 1024

    @abstractmethod
    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after one more text ``ids [1, T]``; it is empty before the first."""

    @abstractmethod
    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the method needs to know about this model, as named tensors, from the state after the last text."""


def watch(
    model: PreTrainedModel, ids: Tensor, look: Look, logits: int = 0, after: KVCache | None = None
) -> Tensor | None:
    """One forward of ``ids [1, T]`` in which ``look(layer, call, lse)`` sees every layer that a budget governs.

    The text goes on from the cache ``after``, which is left as it is (None: it begins here). Returns the logits
    ``[logits, V]`` of as many last tokens, None for 0.
    """
    cache = KVCache(model, "full") if after is None else after.fork()
    governed = {layer.layer_idx for layer in cache.enforcer.layers}

    def seen(index: int, call: AttentionCall, lse: Tensor, *_: Any) -> None:
        if index in governed:
            look(index, call, lse)

    cache.probing = seen
    with torch.inference_mode():
        if not logits:
            model.base_model(ids, past_key_values=cache, use_cache=True)
            return None
        return model(ids, past_key_values=cache, use_cache=True).logits[0, -logits:]


def logits_of(call: AttentionCall, queries: slice | Tensor, keys: slice = slice(None)) -> Tensor:
    """Scaled and capped logits ``[Hkv, G, n, t]`` in float32 of some queries of a forward over one text, later keys included."""
    key = call.key[0, :, None, keys].float()
    query = call.query[0, :, queries].float().unflatten(0, (len(key), -1))
    return capped(query @ key.mT * call.scale, call.softcap)
