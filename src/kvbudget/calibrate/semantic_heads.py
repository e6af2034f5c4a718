"""Which query heads look at a whole passage while it is repeated, and which layers suffer from eviction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration, logits_of, watch
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry
from kvbudget.policy.scoring import pool


@dataclass(frozen=True)
class SemanticHeads(TextCalibration):
    """CompressKV (arXiv 2508.02401): each text is followed by a passage of itself, which the model is to go on with.

    From the passage's ``cue`` on, every step whose most likely token is one of the passage adds the attention that a head
    pays the whole passage in the text; texts whose passage is not repeated to ``recall`` do not count. The error of a layer
    is ``|O_full - O_kept| / |O_full|`` of its attention over the repeated tokens, when the ``share`` best entries stay by
    the votes of all heads. The artifact holds ``heads [L, number]`` (query heads, best first), ``scores [L, Hq]`` and
    ``importance``, the mean errors of the layers that a budget governs over their sum.

    Attributes:
        count: number of texts.
        length: tokens of each.
        passage: tokens that are repeated, at a depth that moves with the texts.
        cue: tokens of the passage that are given.
        recall: share of the rest that must be repeated rightly (paper: 0.5).
        number: heads per layer (paper: 4).
        share: entries that stay when errors are measured.
        window: queries that vote then (paper: 8).
    """

    method: ClassVar[str] = "compresskv"

    passage: int = 32
    cue: int = 12
    recall: float = 0.5
    number: int = 4
    share: float = 0.1
    window: int = 8

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not 0 < self.cue < self.passage < self.length - self.window:
            raise PolicyError(
                f"compresskv: a cue of {self.cue} and a passage of {self.passage} tokens do not fit texts of {self.length}"
            )
        geometry = CacheGeometry.from_config(model.config)
        query_heads = max(layer.num_attention_heads for layer in geometry.layers)
        if not state:
            zeros = torch.zeros(len(geometry.layers))
            state = {"scores": zeros[:, None].repeat(1, query_heads), "errors": zeros, "runs": torch.zeros(2)}
        done = float(state["runs"][1])
        begin = int((0.1 + 0.8 * (done * 0.618 % 1.0)) * (self.length - self.passage))
        passage = ids[:, begin : begin + self.passage]
        steps = self.passage - self.cue
        paid, errors = torch.zeros(len(geometry.layers), query_heads, steps), torch.zeros(len(geometry.layers))

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            weights = causal_weights(call, slice(-steps - 1, -1))
            paid[index] = weights[..., begin : begin + self.passage].sum(-1).flatten(0, 1).cpu()
            errors[index] = self._error(call, weights, steps)

        logits = watch(model, torch.cat([ids, passage], dim=1), look, logits=steps + 1)
        assert logits is not None
        said = logits[:-1].argmax(-1)
        right = float((said == passage[0, self.cue :]).float().mean()) > self.recall
        hits = torch.isin(said, passage[0]).float().cpu() * right
        return {
            "scores": state["scores"] + paid @ hits,
            "errors": state["errors"] + errors,
            "runs": state["runs"] + torch.tensor([float(right), 1.0]),
        }

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not state["runs"][0]:
            raise PolicyError(
                f"the model repeated no passage to more than {self.recall}, so its retrieval heads cannot be told; give a "
                "longer cue= or a lower recall="
            )
        errors = state["errors"][list(CacheGeometry.from_config(model.config).budgeted_layers)]
        heads = state["scores"].topk(min(self.number, state["scores"].shape[1])).indices
        return {"heads": heads, "scores": state["scores"], "importance": errors / errors.sum()}

    def _error(self, call: AttentionCall, weights: Tensor, steps: int) -> float:
        """Relative error of the attention of the last ``steps`` queries when few of the entries before them stay."""
        before = call.key.shape[2] - steps - 1
        judged = before - self.window
        votes = causal_weights(call, slice(judged, before))[..., :judged].sum(2).mean((0, 1))
        keep = torch.ones(call.key.shape[2], dtype=torch.bool, device=votes.device)
        keep[:judged] = False
        keep[pool(votes, 5).topk(max(1, min(judged, int(self.share * before)))).indices] = True
        kept = weights * keep
        kept = kept / kept.sum(-1, keepdim=True)
        value = call.value[0].float()[:, None]
        full = weights @ value
        return float((kept @ value - full).norm() / full.norm())


def causal_weights(call: AttentionCall, rows: slice) -> Tensor:
    """Causal softmax weights ``[Hkv, G, w, T]`` of some rows of a forward over one whole text."""
    logits = logits_of(call, rows)
    step = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(step > step[rows, None], float("-inf")).softmax(-1)
