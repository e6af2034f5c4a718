"""Thresholds that stand for the k largest attention weights of a row, per query head and length of the row."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.calibrate.base import TextCalibration
from kvbudget.errors import PolicyError
from kvbudget.models import CacheGeometry
from kvbudget.policy.base import Selector
from kvbudget.segments.selective import Chosen, Reading


class TopK(Selector):
    """Reads the true ``k`` largest of each row, and adds the k-th to sums by the nearest of ``lengths [N]``."""

    def __init__(self, k: int, first: int, on_logits: bool, lengths: Tensor, sums: Tensor) -> None:
        self.k, self.first, self.on_logits, self.lengths, self.sums = k, first, on_logits, lengths, sums

    def select(self, reading: Reading) -> Chosen:
        """True top-k attention over one text whose entries are all held, at the queries of one block."""
        k = self.first if reading.layer_idx < 2 else self.k
        weights = reading.probabilities
        length = reading.visible[0, 0].sum(-1)
        judged = reading.logits if self.on_logits else weights
        # The "lower" quantile at 1 - k / n, as an index from the smallest.
        number = length.clamp_min(1)
        index = ((1 - k / number).clamp_min(0.0) * (number - 1)).floor().long() + (judged.shape[-1] - number)
        hidden = judged.masked_fill(~reading.visible[:, :, None], float("-inf"))
        ordered = hidden.sort(dim=-1).values
        least = ordered.gather(-1, index[:, None].expand(*ordered.shape[:-1], 1))[..., 0]
        long = length > k
        near = (length[:, None] - self.lengths.to(length.device)).abs().argmin(-1)[long]
        found = least[0].flatten(0, 1)[:, long].double().cpu()
        for power in range(3):
            self.sums[power, reading.layer_idx].index_add_(1, near.cpu(), found**power)
        kept = weights * ((judged > least[..., None]) | ~long[:, None])
        return Chosen(kept / kept.sum(-1, keepdim=True).clamp_min(1e-30))


@dataclass(frozen=True)
class ThresholdFit(TextCalibration):
    """Top-Theta (arXiv 2502.08363): mean plus ``sigma`` deviations of the k-th largest weights (or logits) of rows.

    Rows are pooled by the nearest multiple of ``step`` of their length. The artifact holds ``lengths [N]`` and ``thresholds
    [L, Hq, N]`` float32 (0 for layers that no budget governs).

    Attributes:
        count: number of texts.
        length: tokens of each; longer rows use the thresholds of the longest.
        on: weights or logits.
        k: entries that a row should read (paper: 64 to 128).
        first: the same for layers 0 and 1 (paper: 512).
        sigma: deviations added to the mean (paper: 0.1).
        step: rows' lengths per threshold.
    """

    method: ClassVar[str] = "top_theta"

    on: Literal["weights", "logits"] = "weights"
    k: int = 64
    first: int = 512
    sigma: float = 0.1
    step: int = 64

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.on not in ("weights", "logits") or min(self.k, self.first, self.step) < 1 or self.length <= self.k:
            raise PolicyError(
                f"top_theta: on={self.on!r} must be weights or logits, and k={self.k}, first={self.first}, step={self.step} at "
                f"least 1, with texts of more than k tokens ({self.length} now)"
            )
        layers = CacheGeometry.from_config(model.config).layers
        lengths = torch.arange(self.step, self.length + self.step, self.step)
        shape = (3, len(layers), max(layer.num_attention_heads for layer in layers), len(lengths))
        sums = state["sums"].clone() if state else torch.zeros(shape, dtype=torch.float64)
        cache = KVCache(model, "full")
        for layer in cache.enforcer.layers:
            layer.selector = TopK(self.k, self.first, self.on == "logits", lengths, sums)
        with torch.inference_mode():
            model.base_model(ids, past_key_values=cache, use_cache=True)
        return {"sums": sums}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        number, total, squares = state["sums"]
        lengths = torch.arange(self.step, self.length + self.step, self.step)
        mean = total / number.clamp_min(1)
        deviation = (squares / number.clamp_min(1) - mean.square()).clamp_min(0.0).sqrt()
        thresholds = mean + self.sigma * deviation
        # Lengths at which every row was dense take the threshold of the next longer one.
        for index in range(len(lengths) - 2, -1, -1):
            missing = number[..., index] == 0
            thresholds[..., index] = torch.where(missing, thresholds[..., index + 1], thresholds[..., index])
        return {"lengths": lengths, "thresholds": thresholds.float()}
