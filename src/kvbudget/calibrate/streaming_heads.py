"""Which KV heads lose what they say when they see only the beginning of the text and the newest tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration, logits_of, watch
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry

ROWS = 256
"""Queries whose attention is held at a time."""


@dataclass(frozen=True)
class StreamingHeads(TextCalibration):
    """DuoAttention (arXiv 2410.10819): each text is followed by a passage of itself, and heads are judged while it is repeated.

    The paper learns a gate per KV head between full attention and attention to ``sinks`` and ``recent`` tokens, against the
    change of the last hidden state where a passkey is answered. Here the change is that of the head's own output,
    ``|O_full - O_streaming| / |O_full|`` over the repeated tokens and the GQA group, which needs forward passes only. The
    artifact holds the means over texts, ``change [L, Hkv]`` float32 over all layers of the model (-1 where no budget governs
    a head): heads that change most are the retrieval heads.

    Attributes:
        count: number of texts.
        length: tokens of each.
        passage: tokens that are repeated, at a depth that moves with the texts.
        sinks: first tokens that a streaming head sees (paper: 128 in training).
        recent: newest tokens that it sees (paper: 256).
    """

    method: ClassVar[str] = "duo_attention"

    count: int = 8
    passage: int = 32
    sinks: int = 16
    recent: int = 128

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not 0 < self.passage < self.length - self.recent - self.sinks:
            raise PolicyError(
                f"duo_attention: texts of {self.length} tokens leave a head nothing to miss beyond {self.sinks} sinks and "
                f"{self.recent} recent tokens of a passage of {self.passage}; give a longer length="
            )
        layers = CacheGeometry.from_config(model.config).layers
        if not state:
            shape = len(layers), max(layer.num_kv_heads for layer in layers)
            state = {"change": torch.full(shape, -1.0), "runs": torch.zeros(1)}
        done = float(state["runs"][0])
        # The passage lies where streaming heads do not see it when it is repeated.
        room = self.length - self.recent - self.sinks - self.passage
        begin = self.sinks + int((done * 0.618 % 1.0) * room)
        change = state["change"].clone()

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            found = self._change(call).cpu()
            row = change[index, : len(found)]
            row.copy_(found if not done else row + (found - row) / (done + 1))

        watch(model, torch.cat([ids, ids[:, begin : begin + self.passage]], dim=1), look)
        return {"change": change, "runs": state["runs"] + 1}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"change": state["change"]}

    def _change(self, call: AttentionCall) -> Tensor:
        """Relative change ``[Hkv]`` of the outputs for the passage's queries when a head only streams."""
        heads, length = call.key.shape[1], call.key.shape[2]
        value = call.value[0].float()[:, None]
        position = torch.arange(length, device=value.device)
        lost, whole = torch.zeros(2, heads, device=value.device)
        for begin in range(length - self.passage, length, ROWS):
            at = position[begin : min(begin + ROWS, length), None]
            logits = logits_of(call, at[:, 0])
            causal = position <= at
            near = causal & ((position < self.sinks) | (position > at - self.recent))
            full = logits.masked_fill(~causal, float("-inf")).softmax(-1) @ value
            part = logits.masked_fill(~near, float("-inf")).softmax(-1) @ value
            lost += (full - part).square().sum((1, 2, 3))
            whole += full.square().sum((1, 2, 3))
        return (lost / whole.clamp_min(1e-30)).sqrt()
